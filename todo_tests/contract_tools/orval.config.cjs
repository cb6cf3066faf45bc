// For orval: a client on fetch, whose address and token are orval_send.ts's matter.
module.exports = {
  todo: {
    input: "openapi.yaml",
    output: {
      target: "orval/todo.ts",
      client: "fetch",
      override: { mutator: { path: "orval_send.ts", name: "send", extension: ".js" } },
    },
  },
};
