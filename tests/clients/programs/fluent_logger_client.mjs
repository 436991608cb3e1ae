// Sends with @fluent-org/logger: ADDRESS COUNT MODE; see `tests/clients/harness.py`.
import { FluentClient } from "@fluent-org/logger";

const [address, total, eventMode] = process.argv.slice(2);
const [host, port] = address.split(":");
const count = Number(total);
const client = new FluentClient("app", {
  socket: { host, port: Number(port), timeout: 3000 },
  eventMode,
  ack: { ackTimeout: 5000 },
  eventRetry: { attempts: 60, delay: 200, maxDelay: 2000 },
  milliseconds: true,
});
for (let n = 0; n < count; n += 50) {
  const some = [];
  for (let m = n; m < Math.min(n + 50, count); m++) some.push(client.emit("web", { n: m }));
  if (n === Math.floor(count / 100) * 50) console.log("half");
  await Promise.all(some);
}
await client.disconnect();
