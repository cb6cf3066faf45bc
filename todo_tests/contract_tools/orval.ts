// A caller of the client that orval generates.
import { createTask, deleteTask, getTask, listTasks, toggleTask, updateTask } from "./orval/todo.js";
import type { NewTask, Task } from "./orval/todo.js";
import { same } from "./same.js";

declare const process: { argv: string[] };

const user_id = process.argv[4] as string;
const user = encodeURIComponent(user_id); // this client does not encode what it puts into a path

const created = await createTask(user, { title: "Tea" });
if (created.status !== 201) throw new Error(created.data.detail);
const task: Task = created.data;
same([task.user_id, task.title, task.description, task.completed], [user_id, "Tea", null, false]);
same(created.headers.get("Location"), `/api/${user}/tasks/${task.id}`);

const changed = await updateTask(user, task.id, { ...task, completed: true });
same([changed.status, changed.status === 200 && changed.data.completed], [200, true]);
const done = await listTasks(user, { completed: true });
same(done.status === 200 && done.data.map((each) => each.id), [task.id]);
const toggled = await toggleTask(user, task.id);
same(toggled.status === 200 && toggled.data.completed, false);
same((await getTask(user, task.id)).data, toggled.data);
same((await deleteTask(user, task.id)).status, 204);

const gone = await getTask(user, task.id);
same(gone.status === 404 && gone.data.error_code, "TASK_NOT_FOUND");
const blank = await createTask(user, { title: " " });
same(blank.status === 422 && blank.data.field_errors.title, ["Title is required and cannot be empty"]);

export const mistakes = [
  // @ts-expect-error a text is no id
  () => getTask(user, "1"),
  // @ts-expect-error no title
  () => createTask(user, { description: "Milk" }),
  // @ts-expect-error a new task is not completed
  { title: "Tea", completed: true } satisfies NewTask,
  // @ts-expect-error there may be no description
  () => task.description.length,
  // @ts-expect-error the request may have failed
  () => toggled.data.title,
  // @ts-expect-error only a 422 has faults of fields
  () => gone.data.field_errors,
];
