// For hey-api's openapi-ts: a client whose requests and answers are checked by zod schemas.
export default {
  input: "openapi.yaml",
  output: { path: "hey-api", importFileExtension: ".js" },
  plugins: ["@hey-api/typescript", "@hey-api/client-fetch", "zod", { name: "@hey-api/sdk", validator: true }],
};
