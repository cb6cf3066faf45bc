// Real Better Auth servers on loopback, in one Node process that tests drive over HTTP.
// A server is data: Better Auth's own options, and what its JWKS shall answer instead.

import { createServer } from 'node:http'
import { memoryAdapter } from 'better-auth/adapters/memory'
import { betterAuth } from 'better-auth/minimal'
import { toNodeHandler } from 'better-auth/node'
import { bearer, jwt } from 'better-auth/plugins'
import { SignJWT } from 'jose'

const servers = new Map()

const listen = (server) =>
  new Promise((resolve) => server.listen(0, '127.0.0.1', () => resolve(server.address().port)))

const body = async (request) => {
  let text = ''
  for await (const chunk of request) text += chunk
  return JSON.parse(text || '{}')
}

// What tutorials do: HS256 under the secret, with the claims that Better Auth hands over.
const hs256 = (secret) => (payload) =>
  new SignJWT(payload).setProtectedHeader({ alg: 'HS256' }).sign(new TextEncoder().encode(secret))

async function start({ options, jwtOptions = {}, customSign = false, path = '' }) {
  const state = { jwks: null, jwksRequests: 0, mails: [] }
  const db = { user: [], session: [], account: [], verification: [], jwks: [] }
  let handler
  const server = createServer(async (request, response) => {
    const origin = request.headers.origin
    if (options.trustedOrigins?.includes(origin)) {
      response.setHeader('Access-Control-Allow-Origin', origin)
      response.setHeader('Access-Control-Allow-Credentials', 'true')
      response.setHeader('Access-Control-Allow-Headers', 'Content-Type')
      if (request.method === 'OPTIONS') return response.writeHead(204).end()
    }
    if (request.url.endsWith('/jwks')) {
      state.jwksRequests += 1
      if (state.jwks === 'nothing') return request.socket.destroy()
      if (state.jwks) return response.writeHead(...state.jwks.head).end(state.jwks.body)
    }
    return handler(request, response)
  })
  const port = await listen(server)
  const baseURL = `http://localhost:${port}`
  const auth = betterAuth({
    baseURL: baseURL + path,
    database: memoryAdapter(db),
    rateLimit: { enabled: false },
    logger: { level: 'error' },
    telemetry: { enabled: false },
    emailAndPassword: { enabled: true },
    emailVerification: {
      sendOnSignUp: true,
      sendVerificationEmail: async ({ token }) => state.mails.push(token),
    },
    plugins: [
      bearer(),
      jwt(
        customSign
          ? {
              jwks: { remoteUrl: `${baseURL}/keys`, keyPairConfig: { alg: 'ES256' } },
              jwt: { sign: hs256(options.secret) },
            }
          : jwtOptions,
      ),
    ],
    ...options,
  })
  handler = toNodeHandler(auth)
  servers.set(baseURL, { auth, db, state, server })
  return { url: baseURL }
}

const commands = {
  start,
  // The next token makes a new key; the old one stays listed for Better Auth's 30 days.
  async rotate({ url }) {
    for (const key of servers.get(url).db.jwks) key.expiresAt = new Date(Date.now() - 1)
  },
  async withdraw({ url }) {
    servers.get(url).db.jwks.length = 0
  },
  // Any claims and any header, signed by Better Auth itself with its own keys.
  async sign({ url, payload, overrideOptions }) {
    return servers.get(url).auth.api.signJWT({ body: { payload, overrideOptions } })
  },
  async answer({ url, jwks }) {
    servers.get(url).state.jwks = jwks
  },
  async state({ url }) {
    const { jwksRequests, mails } = servers.get(url).state
    return { jwksRequests, mails }
  },
  async stop({ url }) {
    const { server } = servers.get(url)
    server.close()
    server.closeAllConnections()
    servers.delete(url)
  },
}

const control = createServer(async (request, response) => {
  try {
    const answer = await commands[request.url.slice(1)](await body(request))
    response.end(JSON.stringify(answer ?? {}))
  } catch (error) {
    response.writeHead(500).end(String(error?.stack ?? error))
  }
})
console.log(await listen(control))
process.stdin.on('end', () => process.exit()).resume()
