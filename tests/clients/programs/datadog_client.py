"""Sends with Datadog's API client: ADDRESS COUNT; see `harness.py`."""

import json
import sys

from datadog_api_client import ApiClient, Configuration
from datadog_api_client.v2.api.logs_api import LogsApi
from datadog_api_client.v2.model.content_encoding import ContentEncoding
from datadog_api_client.v2.model.http_log import HTTPLog
from datadog_api_client.v2.model.http_log_item import HTTPLogItem

address, count = sys.argv[1], int(sys.argv[2])

configuration = Configuration(
    api_key={"apiKeyAuth": "0123456789abcdef0123456789abcdef"},
    server_index=1,
    server_variables={"protocol": "http", "name": address.removeprefix("http://")},
    enable_retry=True,
    max_retries=20,
)

with ApiClient(configuration) as client:
    logs = LogsApi(client)
    for first in range(0, count, 20):
        items = [
            HTTPLogItem(message=json.dumps({"n": n}), ddsource="shop", ddtags="env:test")
            for n in range(first, first + 20)
        ]
        encoding = ContentEncoding.GZIP if first % 40 else ContentEncoding.DEFLATE
        logs.submit_log(HTTPLog(items), content_encoding=encoding)
        if first == count // 2:
            print("half", flush=True)
