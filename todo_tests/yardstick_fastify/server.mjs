// The yardstick of bench.py for a JavaScript team's best: Fastify, postgres.js, fast-jwt and pino, used
// as they advise for speed: one process, answers serialised by schema, statements prepared and
// pipelined, verified tokens remembered. Configured by NEON_DB_URL, BETTER_AUTH_SECRET and PORT.
import { randomUUID } from 'node:crypto'
import cors from '@fastify/cors'
import { createVerifier } from 'fast-jwt'
import Fastify from 'fastify'
import postgres from 'postgres'

// postgres.js takes no URL without a host, such as that of a PostgreSQL on a Unix socket.
const url = new URL(process.env.NEON_DB_URL.replace('@/', '@localhost/'))
const sql = postgres({
  host: url.searchParams.get('host') ?? url.hostname,
  port: url.port || 5432,
  database: url.pathname.slice(1),
  username: decodeURIComponent(url.username),
  password: decodeURIComponent(url.password),
  max: 10,
  types: { bigint: { to: 20, from: [20], parse: Number, serialize: String } },
})

const verify = createVerifier({
  key: process.env.BETTER_AUTH_SECRET,
  algorithms: ['HS256'],
  requiredClaims: ['exp', 'sub'],
  cache: 10_000,
})

const problem = (statusCode, code, detail) => Object.assign(new Error(detail), { statusCode, code })
const forbidden = () => problem(403, 'FORBIDDEN', 'You do not have permission to access this resource.')
const notFound = () => problem(404, 'TASK_NOT_FOUND', 'Task not found.')

const app = Fastify({
  logger: true,
  disableRequestLogging: true, // two lines a request; ours is one
  requestIdHeader: 'x-request-id',
  genReqId: () => randomUUID(),
  ajv: { customOptions: { coerceTypes: false } },
})
app.decorateRequest('user', '')
await app.register(cors, {
  origin: process.env.ALLOWED_ORIGINS.split(','),
  credentials: true,
  methods: ['DELETE', 'GET', 'HEAD', 'PATCH', 'POST', 'PUT'],
  exposedHeaders: ['Location', 'WWW-Authenticate', 'X-Request-ID'],
})
app.addHook('onRequest', (request, reply, done) => {
  reply.header('cache-control', 'no-store')
  reply.header('x-content-type-options', 'nosniff')
  reply.header('x-request-id', request.id)
  done()
})
app.addHook('onResponse', ({ method, url, user, ip, log }, { statusCode, elapsedTime }, done) => {
  log.info({ method, url, status: statusCode, ms: elapsedTime, user, client: ip })
  done()
})
app.setErrorHandler((error, request, reply) => {
  const status = error.validation ? 422 : (error.statusCode ?? 500)
  if (status === 500) request.log.error(error)
  const detail = status === 500 ? 'An unexpected error occurred. Please try again later.' : error.message
  reply.code(status).send({ detail, error_code: error.code ?? 'INTERNAL_ERROR' })
})

const string = { type: 'string' }
const nullable = { type: 'string', nullable: true }
const time = { type: 'string', format: 'date-time' }
const task = {
  type: 'object',
  properties: {
    id: { type: 'integer' }, user_id: string, title: string, description: nullable,
    completed: { type: 'boolean' }, created_at: time, updated_at: time,
  },
}
const newTask = {
  type: 'object',
  required: ['title'],
  properties: {
    title: { type: 'string', minLength: 1, maxLength: 200, pattern: '\\S' },
    description: { ...nullable, maxLength: 1000 },
  },
}
const params = { type: 'object', properties: { id: { type: 'string', pattern: '^[1-9][0-9]{0,17}$' } } }
const one = { params, response: { 200: task } }

app.get('/healthz', () => ({ status: 'ok' }))
app.register(async (api) => {
  api.addHook('onRequest', (request, reply, done) => {
    try {
      request.user = verify(request.headers.authorization?.replace(/^bearer /i, '')).sub
    } catch {
      return done(problem(401, 'INVALID_TOKEN', 'Invalid or expired authentication token.'))
    }
    done(request.user === request.params.user ? undefined : forbidden())
  })
  api.get('/', { schema: { response: { 200: { type: 'array', items: task } } } }, ({ user }) =>
    sql`select * from tasks where user_id = ${user} order by id desc`)
  api.post('/', { schema: { body: newTask, response: { 201: task } } }, async ({ user, body }, reply) => {
    const [created] = await sql`insert into tasks (user_id, title, description)
      values (${user}, ${body.title}, ${body.description ?? null}) returning *`
    reply.code(201).header('location', `/api/${encodeURIComponent(user)}/tasks/${created.id}`)
    return created
  })
  api.get('/:id', { schema: one }, async ({ user, params: { id } }) => {
    const [found] = await sql`select * from tasks where id = ${id}`
    if (!found) throw notFound()
    if (found.user_id !== user) throw forbidden()
    return found
  })
  api.patch('/:id/complete', { schema: one }, async ({ user, params: { id } }) => {
    const [changed] = await sql`update tasks set completed = not completed, updated_at = now()
      where id = ${id} and user_id = ${user} returning *`
    if (changed) return changed
    throw (await sql`select from tasks where id = ${id}`).length ? forbidden() : notFound()
  })
}, { prefix: '/api/:user/tasks' })

await app.listen({ host: '127.0.0.1', port: Number(process.env.PORT) })
