"""Scraping, as Prometheus does it."""

from __future__ import annotations

import http.client
import socket
from pathlib import Path

from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

#: Values by name and labels: 'lazypages_faults_total', 'lazypages_tasks_ended_total{state="complete"}'.
Values = dict[str, float]

TIMEOUT = 20


class _Connection(http.client.HTTPConnection):
    """To a unix socket (a path), or HOST:PORT."""

    def __init__(self, address: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT)
        self._address = address

    def connect(self) -> None:
        if "/" in self._address:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(TIMEOUT)
            self.sock.connect(self._address)
        else:
            host, _, port = self._address.rpartition(":")
            self.sock = socket.create_connection((host, int(port)), TIMEOUT)


def get(
    address: str, path: str = "/metrics", *, method: str = "GET", accept: str = ""
) -> tuple[int, str, str]:
    """Status, Content-Type and body."""
    connection = _Connection(address)
    try:
        connection.request(method, path, headers={"Accept": accept} if accept else {})
        answer = connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read().decode()
    finally:
        connection.close()


def scrape(address: str) -> Values:
    status, _, text = get(address)
    assert status == 200, text
    return values(text)


def values(text: str) -> Values:
    found: Values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def names(text: str) -> set[str]:
    """Of all metrics, by the rules of OpenMetrics, which are stricter."""
    return {family.name for family in openmetrics.text_string_to_metric_families(text)}


def textfile(path: Path) -> Values:
    return values(path.read_text())
