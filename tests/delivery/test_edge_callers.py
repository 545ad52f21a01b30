"""Whom the edge lets in: anyone, and says so, or callers alone whose certificate an authority in clients.crt has signed."""

from __future__ import annotations

import os
import ssl
import subprocess
from pathlib import Path

import httpx

from benchmarks.rehearsal_parts import EDGE, Certificates, Edge, wait_until
from tests.ports import free_port
from tests.programs import needed


def test_with_clients_crt_only_callers_with_a_certificate_of_theirs_get_in(tmp_path: Path) -> None:
    needed("openssl")
    # Given authorities that sign callers, among them not the one that has signed the edge
    ours, theirs = Certificates(tmp_path / "ours"), Certificates(tmp_path / "theirs")
    ours.renew(tmp_path / "tls", "edge")
    theirs.renew(tmp_path / "caller", "caller")
    ours.renew(tmp_path / "stranger", "stranger")
    (tmp_path / "tls" / "clients.crt").write_bytes(theirs.authority.read_bytes())
    edge = Edge(tmp_path, tmp_path / "tls", ports=[free_port() for _ in range(4)])

    def answered(port: int, folder: str) -> int:
        """What HTTP status a caller hears that shows this folder's certificate; 0: it is not let in."""
        context = ssl.create_default_context(cafile=str(ours.authority))
        if folder:
            context.load_cert_chain(tmp_path / folder / "tls.crt", tmp_path / folder / "tls.key")
        try:
            return httpx.get(f"https://localhost:{port}/metrics", verify=context, trust_env=False).status_code
        except httpx.TransportError:
            return 0

    edge.start()
    try:
        # Then each door answers the caller (that there is no such page), and nobody else
        for port in (edge.vision_port, edge.queue_port):
            wait_until("it listens", lambda port=port: answered(port, "caller") == 404)
            assert [answered(port, "stranger"), answered(port, "")] == [0, 0]
        assert "whoever reaches it may call" not in edge.text()
    finally:
        edge.kill()


def test_without_clients_crt_it_is_said_that_anyone_may_call(tmp_path: Path) -> None:
    env = {**os.environ, "EDGE_RUN_DIR": str(tmp_path), "EDGE_TLS_DIR": str(tmp_path)}

    def said() -> str:
        return subprocess.run([EDGE, "render"], env=env, capture_output=True, text=True, check=True).stderr

    assert "whoever reaches it may call" in said()
    # A link that leads nowhere is no reason to let all in: Envoy then refuses to begin
    (tmp_path / "clients.crt").symlink_to("nowhere")
    assert said() == "" and "require_client_certificate: true" in (tmp_path / "envoy.yaml").read_text()
