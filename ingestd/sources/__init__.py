"""Sources `http`, `stdin` and `fetch` check, bound and count records and hand them to pipelines."""
