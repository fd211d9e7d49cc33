"""HTTP and web pages over a predictor."""

from importlib import import_module

from fieldmark.errors import needs_extra

for package in ("fastapi", "python_multipart", "prometheus_client", "uvicorn"):
    with needs_extra(package.replace("_", "-"), "serve"):
        import_module(package)
