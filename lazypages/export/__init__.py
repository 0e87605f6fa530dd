"""Numbers for monitoring systems: Prometheus and OpenTelemetry (docs/metrics.md)."""
