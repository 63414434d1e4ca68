"""Traces for an OpenTelemetry collector. Its SDK is an extra: only `tracing` and `export` import it, and are imported
when traces are wanted.
"""

PROPAGATED = frozenset({b"traceparent", b"tracestate"})
"""Headers that tell of the caller's span; with traces on, a leg sends its own."""
