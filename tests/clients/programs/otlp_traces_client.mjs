// Sends spans with @opentelemetry/sdk-trace-base in protobuf: ADDRESS COUNT; see tests/clients/harness.py.
import { OTLPTraceExporter } from "@opentelemetry/exporter-trace-otlp-proto";
import { resourceFromAttributes } from "@opentelemetry/resources";
import { BasicTracerProvider, BatchSpanProcessor } from "@opentelemetry/sdk-trace-base";

const [address, count] = [process.argv[2], Number(process.argv[3])];
const exporter = new OTLPTraceExporter({
  url: `${address}/v1/traces`, timeoutMillis: 60_000, concurrencyLimit: 100,
});
const processor = new BatchSpanProcessor(exporter, {
  maxExportBatchSize: 20, scheduledDelayMillis: 100, exportTimeoutMillis: 60_000,
});
const provider = new BasicTracerProvider({
  resource: resourceFromAttributes({ "service.name": "test" }), spanProcessors: [processor],
});
const tracer = provider.getTracer("test");
for (let n = 0; n < count; n++) {
  tracer.startSpan("order", { attributes: { n } }).end();
  if (n === count / 2) console.log("half");
}
await provider.forceFlush();
await provider.shutdown();
