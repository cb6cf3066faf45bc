// What orval's client sends its requests with: it adds the address and the token.
declare const process: { argv: string[] };

const [baseUrl, token] = process.argv.slice(2) as [string, string];

export async function send<Answer>(path: string, options: RequestInit): Promise<Answer> {
  const headers = { ...options.headers, Authorization: `Bearer ${token}` };
  const response = await fetch(baseUrl + path, { ...options, headers });
  const text = await response.text();
  const data: unknown = text === "" ? undefined : JSON.parse(text);
  return { status: response.status, headers: response.headers, data } as Answer;
}
