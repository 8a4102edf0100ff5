"""What a fleet has done, as Prometheus reads it."""

from prometheus_client import CollectorRegistry, Gauge, generate_latest


def fleet_text(status: dict[str, dict[str, float]]) -> str:
    """Requests by their state, and every replica's metrics with its name as a label.

    Args:
        status: as of `Ledger.status`.

    """
    registry = CollectorRegistry()
    replicas = dict(status)
    requests = Gauge("afcache_fleet_requests", "requests by their state", ["state"], registry=registry)
    for state, count in replicas.pop("requests").items():
        requests.labels(state=state).set(count)
    gauges: dict[str, Gauge] = {}
    for replica, metrics in replicas.items():
        for name, value in metrics.items():
            if name not in gauges:
                gauges[name] = Gauge(f"afcache_{name}", name.replace("_", " "), ["replica"], registry=registry)
            gauges[name].labels(replica=replica).set(value)
    return generate_latest(registry).decode()
