"""What an overlay renders to, and where in it a thing is found."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from deploy.validation import tools
from deploy.validation.findings import Finding

HERE = Path(__file__).resolve().parent
NO_KUBECTL = "Run `make setup`, which installs kubectl into .venv, or install kubectl 1.30 or newer."
COMPONENT = "app.kubernetes.io/component"

Object = dict[str, Any]


class DoesNotRender(Exception):
    """Kustomize refused an overlay; its own words."""


@dataclass(frozen=True)
class Workload:
    """A Deployment or StatefulSet."""

    document: Object

    @property
    def name(self) -> str:
        """`ai4thai-vision`."""
        return str(self.document["metadata"]["name"])

    @property
    def component(self) -> str:
        """`vision`, `queue`, `worker`, `redis`: what its pods say they are."""
        return self.labels.get(COMPONENT, "")

    @property
    def spec(self) -> Object:
        """How many, and how they are replaced."""
        return dict(self.document["spec"])

    @property
    def pod(self) -> Object:
        """The pods' spec."""
        return dict(self.document["spec"]["template"]["spec"])

    @property
    def labels(self) -> dict[str, str]:
        """The pods' labels."""
        return dict(self.document["spec"]["template"]["metadata"].get("labels", {}))

    @property
    def container(self) -> Object:
        """The one container that each of our pods has."""
        return dict(self.pod["containers"][0])

    def volume(self, name: str) -> Object:
        """A volume by its name; empty when there is none."""
        return next((dict(volume) for volume in self.pod.get("volumes", ()) if volume["name"] == name), {})


@dataclass(frozen=True)
class Objects:
    """All objects of one overlay."""

    overlay: str
    documents: tuple[Object, ...]

    def of(self, kind: str) -> tuple[Object, ...]:
        """Those of a kind."""
        return tuple(document for document in self.documents if document.get("kind") == kind)

    def named(self, kind: str, name: str) -> Object | None:
        """The one of a kind with this name."""
        return next((one for one in self.of(kind) if one["metadata"]["name"] == name), None)

    @property
    def workloads(self) -> tuple[Workload, ...]:
        """All that runs pods."""
        return tuple(map(Workload, (*self.of("Deployment"), *self.of("StatefulSet"))))

    def workload(self, component: str) -> Workload | None:
        """The one whose pods are this component."""
        return next((one for one in self.workloads if one.component == component), None)

    def environment(self, workload: Workload) -> dict[str, str]:
        """What the container's environment has from ConfigMaps and plain values, later ones winning; secrets are left out."""
        found: dict[str, str] = {}
        for source in workload.container.get("envFrom", ()):
            document = self.named("ConfigMap", source.get("configMapRef", {}).get("name", ""))
            found.update((document or {}).get("data") or {})
        found.update((one["name"], one["value"]) for one in workload.container.get("env", ()) if "value" in one)
        return found

    def wrong(self, document: Mapping[str, Any], wrong: str, cure: str) -> Finding:
        """A finding about an object of this overlay."""
        name = f"{document.get('kind', '?')} {(document.get('metadata') or {}).get('name', '?')}"
        return Finding(f"deploy/kubernetes/overlays/{self.overlay}", 0, f"{name}: {wrong}", cure)


def overlays() -> tuple[str, ...]:
    """The names of all overlays."""
    return tuple(sorted(path.parent.name for path in HERE.glob("overlays/*/kustomization.yaml")))


def render(folder: Path) -> Objects:
    """What `kubectl apply -k` would send.

    Raises:
        ToolMissing: there is no kubectl.
        DoesNotRender: kustomize refuses the folder.
    """
    done = tools.run([tools.find("kubectl", NO_KUBECTL), "kustomize", str(folder)], HERE)
    if done.returncode:
        raise DoesNotRender(done.stderr.strip())
    return read(folder.name, done.stdout)


def read(overlay: str, text: str) -> Objects:
    """The objects of rendered YAML."""
    return Objects(overlay, tuple(one for one in yaml.safe_load_all(text) if one))


def selects(selector: Mapping[str, Any] | None, labels: Mapping[str, str]) -> bool:
    """Whether a label selector (matchLabels, matchExpressions with In) takes these labels; {} takes all, None none."""
    if selector is None:
        return False
    plain = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    return plain and all(
        {"In": labels.get(one["key"]) in one.get("values", ()), "Exists": one["key"] in labels}[one["operator"]]
        for one in selector.get("matchExpressions", ())
    )


@functools.cache
def amount(quantity: str) -> float:
    """A quantity of Kubernetes' as a number: `500m` is 0.5, `2Gi` is 2147483648."""
    units = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    unit = next((unit for unit in sorted(units, key=len, reverse=True) if quantity.endswith(unit)), "")
    return float(quantity.removesuffix(unit)) * units.get(unit, 1)


def hosts(environment: Mapping[str, str]) -> Iterator[tuple[str, str, int]]:
    """The servers inside the cluster that an environment names: the variable, the host, the port."""
    for variable, value in environment.items():
        if variable not in ("REDIS_URL", "QUEUE_VISION_ADDRESS"):
            continue
        address = value.removeprefix("dns:///")
        places = urlsplit(address if "://" in address else f"//{address}").netloc.rpartition("@")[2].split(",")
        for host, _, port in (place.rpartition(":") for place in places):
            yield variable, host, int(port)


def first(found: Iterable[Object]) -> Object:
    """The first, or an empty one."""
    return next(iter(found), {})
