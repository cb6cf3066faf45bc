// A caller in strict TypeScript: what compiles works, and what is wrong does not compile.
import createClient from "openapi-fetch";
import { same } from "./same.js";
import type { components, paths } from "./todo-api.d.ts";

type Schemas = components["schemas"];
declare const process: { argv: string[] };

const [baseUrl, token, user_id] = process.argv.slice(2) as [string, string, string];
const api = createClient<paths>({ baseUrl, headers: { Authorization: `Bearer ${token}` } });
const path = { user_id };

const created = await api.POST("/api/{user_id}/tasks", { params: { path }, body: { title: "Tea" } });
if (!created.data) throw new Error(created.error.detail);
const task: Schemas["Task"] = created.data;
const at = { path: { user_id, id: task.id } };
same([task.user_id, task.title, task.description, task.completed], [user_id, "Tea", null, false]);
same(created.response.headers.get("Location"), `/api/${encodeURIComponent(user_id)}/tasks/${task.id}`);

// A whole task may be sent back.
const changed = await api.PUT("/api/{user_id}/tasks/{id}", { params: at, body: { ...task, completed: true } });
same(changed.data?.completed, true);
const done = await api.GET("/api/{user_id}/tasks", { params: { path, query: { completed: true } } });
same(done.data?.map((each) => each.id), [task.id]);
const toggled = await api.PATCH("/api/{user_id}/tasks/{id}/complete", { params: at });
same(toggled.data?.completed, false);
same((await api.GET("/api/{user_id}/tasks/{id}", { params: at })).data, toggled.data);
same((await api.DELETE("/api/{user_id}/tasks/{id}", { params: at })).response.status, 204);

const gone = await api.GET("/api/{user_id}/tasks/{id}", { params: at });
if (gone.error && !("field_errors" in gone.error)) same(gone.error.error_code, "TASK_NOT_FOUND");
else throw new Error("not gone");
const blank = await api.POST("/api/{user_id}/tasks", { params: { path }, body: { title: " " } });
if (blank.error && "field_errors" in blank.error)
  same(blank.error.field_errors.title, ["Title is required and cannot be empty"]);
else throw new Error("not refused");
same((await api.GET("/readyz")).data?.status, "ready");

export const mistakes = [
  // @ts-expect-error no such path
  () => api.GET("/api/{user_id}/task", { params: { path } }),
  // @ts-expect-error no user
  () => api.GET("/api/{user_id}/tasks"),
  // @ts-expect-error a text is no id
  () => api.GET("/api/{user_id}/tasks/{id}", { params: { path: { user_id, id: "1" } } }),
  // @ts-expect-error a text is no boolean
  () => api.GET("/api/{user_id}/tasks", { params: { path, query: { completed: "true" } } }),
  // @ts-expect-error no title
  () => api.POST("/api/{user_id}/tasks", { params: { path }, body: { description: "Milk" } }),
  // @ts-expect-error the title is not null
  () => api.POST("/api/{user_id}/tasks", { params: { path }, body: { title: null } }),
  // @ts-expect-error a new task is not completed
  { title: "Tea", completed: true } satisfies Schemas["NewTask"],
  // @ts-expect-error the member is called `completed`
  { title: "Tea", complete: true } satisfies Schemas["TaskUpdate"],
  // @ts-expect-error there may be no description
  () => task.description.length,
  // @ts-expect-error the request may have failed
  () => toggled.data.title,
  // @ts-expect-error only a 422 has faults of fields
  () => gone.error?.field_errors,
];
