"""Who may open a connection to whom: exactly those who need to."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploy.kubernetes.objects import COMPONENT, Object, Objects, selects
from deploy.validation.findings import Finding

NAME = "kubernetes.io/metadata.name"
OUR_NAMESPACE = "ai4thai"


@dataclass(frozen=True, eq=False)
class Peer:
    """A pod by its labels and its namespace's, or an address outside (`cidr` stands for any in it)."""

    name: str
    labels: Mapping[str, str]
    namespace: Mapping[str, str]
    address: str = ""

    @property
    def governed(self) -> bool:
        """Whether our policies are about it: they hold for every pod of our namespace, and for no other."""
        return self.namespace.get(NAME) == OUR_NAMESPACE


def _pod(component: str) -> Peer:
    return Peer(component, {COMPONENT: component}, {NAME: OUR_NAMESPACE})


def _outside(name: str, labels: Mapping[str, str] | None = None, **namespace: str) -> Peer:
    return Peer(
        name, labels or {}, {NAME: namespace.pop("of"), **{f"ai4thai/{key}": to for key, to in namespace.items()}}
    )


OURS = tuple(map(_pod, ("vision", "queue", "worker", "redis")))
OTHERS = (
    Peer("a stranger in our namespace", {}, {NAME: OUR_NAMESPACE}),
    _outside("a caller's namespace", of="shop", callers="allowed"),
    _outside("another namespace", of="elsewhere"),
    _outside("KEDA", of="keda"),
    _outside("Prometheus", of="monitoring"),
    _outside("DNS", {"k8s-app": "kube-dns"}, of="kube-system"),
    _outside("the cluster's own pods", of="kube-system"),
    Peer("a public address", {}, {}, "93.184.216.34"),
    Peer("a private address", {}, {}, "10.9.9.9"),
    Peer("the cloud's metadata", {}, {}, "169.254.169.254"),
)
PORTS = (53, 80, 443, 2001, 2003, 5432, 6379, 8443, 26379)

Flow = tuple[str, str, int]
CALLERS = ("a caller's namespace", "Prometheus")


def needed(objects: Objects) -> set[Flow]:
    """The connections that this overlay's parts live on; everything else is to be refused."""
    flows: set[Flow] = {(name, "DNS", 53) for name in ("vision", "queue", "worker")}
    flows |= {(caller, server, port) for caller in CALLERS for server, port in (("vision", 2001), ("queue", 2003))}
    flows |= {("worker", "vision", 2001)}
    flows |= {("queue", "a public address", port) for port in (443, 8443)}  # webhooks
    if objects.workload("redis"):
        flows |= {(name, "redis", 6379) for name in ("queue", "worker")}
    if objects.of("ScaledObject"):
        flows |= {("KEDA", "queue", 2003)}
    if any(str(name).startswith("nvidia.com/") for name in _limits(objects)):
        flows |= {("vision", "a public address", 443)}  # models
    return flows


def check(objects: Objects) -> Iterator[Finding]:
    """Connections that are missing, and those that nobody needs."""
    policies = objects.of("NetworkPolicy")
    if not policies:
        yield objects.wrong(
            {"kind": "NetworkPolicy"}, "there is none: anybody may speak to anything", "Add network.yaml."
        )
        return
    allowed = set(flows(policies))
    for source, target, port in sorted(needed(objects) - allowed):
        yield objects.wrong(
            {"kind": "NetworkPolicy", "metadata": {"name": "*"}},
            f"{source} cannot reach {target} on port {port}",
            "Admit it, at both ends where both are pods of ours: egress there, ingress here.",
        )
    for source, target, port in sorted(allowed - needed(objects)):
        yield objects.wrong(
            {"kind": "NetworkPolicy", "metadata": {"name": "*"}},
            f"{source} may reach {target} on port {port}, and nobody needs that",
            "Narrow the policy; if it is needed after all, add it to needed() in deploy/kubernetes/network_rules.py.",
        )


def flows(policies: Sequence[Object]) -> Iterator[Flow]:
    """Every connection from or to a pod of ours that the policies let through, of all the peers and ports above."""
    everyone = (*OURS, *OTHERS)
    for source in everyone:
        for target in everyone:
            if source == target or not {source, target} & set(OURS):
                continue
            for port in PORTS:
                leaves = not source.governed or _admits(policies, "Egress", source, target, port)
                enters = not target.governed or _admits(policies, "Ingress", target, source, port)
                if leaves and enters:
                    yield source.name, target.name, port


def _admits(policies: Sequence[Object], direction: str, pod: Peer, other: Peer, port: int) -> bool:
    """Kubernetes' rule: who is selected by no policy of a direction is open; else one of their rules must fit."""
    chosen = [
        one["spec"]
        for one in policies
        if direction in one["spec"].get("policyTypes", ["Ingress"]) and selects(one["spec"]["podSelector"], pod.labels)
    ]
    side, key = ("egress", "to") if direction == "Egress" else ("ingress", "from")
    return not chosen or any(
        _port_fits(rule, port) and _peer_fits(rule, key, pod, other) for spec in chosen for rule in spec.get(side) or ()
    )


def _port_fits(rule: Mapping[str, Any], port: int) -> bool:
    return "ports" not in rule or any(one.get("port", port) == port for one in rule["ports"])


def _peer_fits(rule: Mapping[str, Any], key: str, pod: Peer, other: Peer) -> bool:
    if key not in rule:
        return True
    for peer in rule[key]:
        if block := peer.get("ipBlock"):
            inside = bool(other.address) and _within(other.address, block["cidr"])
            if inside and not any(_within(other.address, hole) for hole in block.get("except", ())):
                return True
        elif not other.address:
            if "namespaceSelector" in peer:
                near = selects(peer["namespaceSelector"], other.namespace)
            else:
                near = other.namespace.get(NAME) == pod.namespace.get(NAME)
            if near and selects(peer.get("podSelector", {}), other.labels):
                return True
    return False


def _within(address: str, network: str) -> bool:
    return ipaddress.ip_address(address) in ipaddress.ip_network(network)


def _limits(objects: Objects) -> Iterator[str]:
    for workload in objects.workloads:
        yield from workload.container.get("resources", {}).get("limits", {})
