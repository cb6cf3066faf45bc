// A caller of the client that hey-api generates, which checks requests and answers by zod schemas.
import { client } from "./hey-api/client.gen.js";
import { createTask, deleteTask, getTask, listTasks, toggleTask, updateTask } from "./hey-api/sdk.gen.js";
import type { NewTask, Task } from "./hey-api/types.gen.js";
import { zNewTask, zTask } from "./hey-api/zod.gen.js";
import { same } from "./same.js";

declare const process: { argv: string[] };

const [baseUrl, auth, user_id] = process.argv.slice(2) as [string, string, string];
client.setConfig({ baseUrl, auth });
const path = { user_id };

const created = await createTask({ path, body: { title: "Tea" } });
if (!created.data) throw new Error(JSON.stringify(created.error));
const task: Task = created.data;
const at = { user_id, id: task.id };
same([task.user_id, task.title, task.description, task.completed], [user_id, "Tea", null, false]);
// The schema of int64 is a bigint.
same(zTask.parse(task).id === BigInt(task.id), true);

const changed = await updateTask({ path: at, body: { ...task, completed: true } });
same(changed.data?.completed, true);
const done = await listTasks({ path, query: { completed: true } });
same(done.data?.map((each) => each.id), [task.id]);
const toggled = await toggleTask({ path: at });
same(toggled.data?.completed, false);
same((await getTask({ path: at })).data, toggled.data);
same((await deleteTask({ path: at })).response?.status, 204);

const gone = await getTask({ path: at });
same(gone.error && "error_code" in gone.error && gone.error.error_code, "TASK_NOT_FOUND");

// The schemas refuse what the server refuses, before it is sent.
const blank = await createTask({ path, body: { title: " " } }).catch((error: unknown) => ({ error }));
same((blank.error as Error).name, "ZodError");
const blanks = ["", " ", "\t\r\n", "\u0085\u00a0", "\u1680\u2003\u2028\u2029\u202f\u205f\u3000", "a\0"];
const titles = ["x", " x ", "x\n", "\u200b", "\u2027", "é", "\u{1f600}"];
for (const title of blanks) same([title, zNewTask.safeParse({ title }).success], [title, false]);
for (const title of titles) same([title, zNewTask.safeParse({ title }).success], [title, true]);

export const mistakes = [
  // @ts-expect-error a text is no id
  () => getTask({ path: { user_id, id: "1" } }),
  // @ts-expect-error no title
  () => createTask({ path, body: { description: "Milk" } }),
  // @ts-expect-error a new task is not completed
  { title: "Tea", completed: true } satisfies NewTask,
  // @ts-expect-error there may be no description
  () => task.description.length,
  // @ts-expect-error the request may have failed
  () => toggled.data.title,
];
