"""Spec → Dockerfile → build; and finding what was built."""
