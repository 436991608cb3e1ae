"""Sends with elasticsearch-py or opensearch-py: ADDRESS COUNT TOKEN LIBRARY; see `harness.py`."""

import asyncio
import sys
import time
from collections.abc import Iterator

address, count, token, library = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
node = f"{address}/elastic"
CHUNK = 50
op = "index" if library == "async" else "create"


def chunks() -> Iterator[list[dict[str, object]]]:
    for start in range(0, count, CHUNK):
        if start == count // 2:
            print("half", flush=True)
        numbers = range(start, start + CHUNK)
        yield [
            {"_op_type": op, "_index": "logs", "_id": str(n), "_source": {"n": n}} for n in numbers
        ]


if library == "async":
    from elasticsearch import ApiError, AsyncElasticsearch, TransportError, helpers

    async def send() -> None:
        async with AsyncElasticsearch(node, api_key=token, max_retries=3) as client:
            for chunk in chunks():
                while True:
                    try:
                        async for _ in helpers.async_streaming_bulk(client, chunk):
                            pass
                        break
                    except (TransportError, ApiError):  # ids make it safe to send all of it again
                        await asyncio.sleep(0.2)

    asyncio.run(send())
    sys.exit()

if library == "elasticsearch":
    from elasticsearch import ApiError, Elasticsearch, TransportError, helpers

    errors: tuple[type[Exception], ...] = (TransportError, ApiError)
    client = Elasticsearch(node, api_key=token, max_retries=3, retry_on_timeout=True)
else:
    from opensearchpy import OpenSearch, TransportError, helpers

    errors = (TransportError,)
    client = OpenSearch(node, http_auth=("shop", token), max_retries=3, retry_on_timeout=True)
assert client.ping()
assert client.info()["version"]["number"]
for chunk in chunks():
    while True:
        try:
            helpers.bulk(client, chunk)
            break
        except errors:
            time.sleep(0.2)
