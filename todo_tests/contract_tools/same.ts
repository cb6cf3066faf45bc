export function same(seen: unknown, expected: unknown): void {
  if (JSON.stringify(seen) !== JSON.stringify(expected))
    throw new Error(`${JSON.stringify(seen)} is not ${JSON.stringify(expected)}`);
}
