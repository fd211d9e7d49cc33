"""HTTP and web pages over a predictor."""

from importlib import import_module

from fieldmark.errors import MissingExtraError

for package in ("fastapi", "python_multipart", "prometheus_client", "uvicorn"):
    try:
        import_module(package)
    except ImportError as error:
        raise MissingExtraError((error.name or package).replace("_", "-"), "serve") from None
