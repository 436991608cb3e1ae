// Sends logs with @opentelemetry/sdk-logs as OTLP/JSON: ADDRESS COUNT; see tests/clients/harness.py.
import { OTLPLogExporter } from "@opentelemetry/exporter-logs-otlp-http";
import { resourceFromAttributes } from "@opentelemetry/resources";
import { BatchLogRecordProcessor, LoggerProvider } from "@opentelemetry/sdk-logs";

const [address, count] = [process.argv[2], Number(process.argv[3])];
const exporter = new OTLPLogExporter({
  url: `${address}/v1/logs`, timeoutMillis: 60_000, concurrencyLimit: 100,
});
const processor = new BatchLogRecordProcessor({
  exporter, maxExportBatchSize: 20, scheduledDelayMillis: 100, exportTimeoutMillis: 60_000,
});
const provider = new LoggerProvider({
  resource: resourceFromAttributes({ "service.name": "test" }), processors: [processor],
});
const logger = provider.getLogger("test");
for (let n = 0; n < count; n++) {
  logger.emit({ body: `order ${n}`, severityText: "INFO", attributes: { n } });
  if (n === count / 2) console.log("half");
}
await provider.forceFlush();
await provider.shutdown();
