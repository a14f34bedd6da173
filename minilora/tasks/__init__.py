"""Tasks on real models: several adapters on one base, chosen for each request."""

from .router import Router, embed_texts, keywords

__all__ = ["Router", "embed_texts", "keywords"]
