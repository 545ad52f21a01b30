"""Each pod by itself: locked down, pinned, bounded, probed by the names its server knows, and given the time it needs to end."""

from __future__ import annotations

import re
from collections.abc import Iterator

from deploy.kubernetes import settings
from deploy.kubernetes.objects import Object, Objects, Workload, amount
from deploy.validation.findings import Finding
from queue_server.service import NAME as QUEUE_READY
from serving.health import LIVENESS
from serving.relay import LINGER_SECONDS
from vision_server.reports import READY_NAME as VISION_READY

READY_NAMES = {"vision": VISION_READY, "queue": QUEUE_READY}
LOADING_S = 600  # models take 5 to 10 minutes
SILENT_S = 60  # a server that is busy, or reads weights, may not answer a probe for a while
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
PRIVATE = ("hostNetwork", "hostPID", "hostIPC")
# NVIDIA's profiles by their memory in GB: A100 and H100 80 GB, H100 NVL 94 GB, H200 141 GB.
PROFILES = {
    *("1g.10gb", "1g.20gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb"),
    *("1g.12gb", "1g.24gb", "2g.24gb", "3g.47gb", "4g.47gb", "7g.94gb"),
    *("1g.18gb", "1g.35gb", "2g.35gb", "3g.71gb", "4g.71gb", "7g.141gb"),
}
LEAST_GB = 16
# As the README's example of a site has it.
EXAMPLE_REGISTRY = "registry.example.com/"


def check(objects: Objects) -> Iterator[Finding]:
    """What is wrong with any pod."""
    for workload in objects.workloads:
        for rule in (_restricted, _pinned, _bounded, _accelerator, _probed, _drained, _replaced):
            for wrong, cure in rule(objects, workload):
                yield objects.wrong(workload.document, wrong, cure)


Wrong = Iterator[tuple[str, str]]


def _restricted(objects: Objects, workload: Workload) -> Wrong:
    """Pod Security's profile `restricted`, a read-only root, no token of the API."""
    pod, container = workload.pod, workload.container
    context, inner = pod.get("securityContext", {}), container.get("securityContext", {})
    wanted = {
        "runAsNonRoot is not true": context.get("runAsNonRoot") is True,
        "runAsUser is missing or 0": context.get("runAsUser", 0) > 0,
        "seccompProfile is not RuntimeDefault": context.get("seccompProfile", {}).get("type") == "RuntimeDefault",
        "allowPrivilegeEscalation is not false": inner.get("allowPrivilegeEscalation") is False,
        "readOnlyRootFilesystem is not true": inner.get("readOnlyRootFilesystem") is True,
        "capabilities are not dropped": inner.get("capabilities") == {"drop": ["ALL"]},
        "it is privileged": not inner.get("privileged"),
        "automountServiceAccountToken is not false": pod.get("automountServiceAccountToken") is False,
        "enableServiceLinks is not false": pod.get("enableServiceLinks") is False,
        "it shares a namespace with its node": not any(pod.get(name) for name in PRIVATE),
        "it has more than one container": len(pod["containers"]) == 1 and not pod.get("initContainers"),
    }
    for wrong, holds in wanted.items():
        if not holds:
            yield wrong, "See base/vision.yaml: the namespace refuses pods that are not `restricted`."
    for volume in pod.get("volumes", ()):
        if kinds := set(volume) - {"name"} - VOLUMES:
            yield f"volume {volume['name']} is a {kinds.pop()}", "Take an emptyDir, a claim, a ConfigMap or a Secret."
    mounted = {mount["name"] for mount in container.get("volumeMounts", ())}
    claimed = {one["metadata"]["name"] for one in workload.spec.get("volumeClaimTemplates", ())}
    for name in mounted ^ ({volume["name"] for volume in pod.get("volumes", ())} | claimed):
        yield f"volume {name} is either not mounted or not there", "Name it in `volumes` and in `volumeMounts`."


def _pinned(objects: Objects, workload: Workload) -> Wrong:
    image = str(workload.container["image"])
    tag = image.rpartition("/")[2].partition(":")[2]
    if "@sha256:" not in image and tag in ("", "latest"):
        yield f"image {image} is not pinned", "Give it a tag in `images` of the kustomization: newTag."
    if image.startswith(EXAMPLE_REGISTRY):
        yield f"image {image} lies in a registry that is only an example", "Your own in `images`: newName."


def _bounded(objects: Objects, workload: Workload) -> Wrong:
    resources = workload.container.get("resources", {})
    for kind in ("cpu", "memory", "ephemeral-storage"):
        asked, most = (resources.get(part, {}).get(kind) for part in ("requests", "limits"))
        if asked is None or most is None:
            yield f"{kind} has no request or no limit", "Give it both under `resources`."
        elif amount(asked) > amount(most):
            yield f"{kind}: the request {asked} is above the limit {most}", "Raise the limit."
    most = amount(resources.get("limits", {}).get("ephemeral-storage", "0"))
    disks = [one.get("emptyDir") for one in workload.pod.get("volumes", ())]
    disks = [one for one in disks if one is not None and one.get("medium") != "Memory"]
    if any("sizeLimit" not in one for one in disks):
        yield "an emptyDir has no sizeLimit", "Give it one: else it may fill the node's disk."
    elif sum(amount(one["sizeLimit"]) for one in disks) > most:
        yield "its emptyDirs may grow beyond its ephemeral-storage", "Raise the limit of ephemeral-storage."


def _accelerator(objects: Objects, workload: Workload) -> Wrong:
    resources = workload.container.get("resources", {})
    for name in (
        one for part in ("requests", "limits") for one in resources.get(part, {}) if one.startswith("nvidia.com/")
    ):
        slice_ = re.fullmatch(r"nvidia\.com/mig-(\d+g\.(\d+)gb)", name)
        if name != "nvidia.com/gpu" and (not slice_ or slice_[1] not in PROFILES):
            yield (
                f"there is no resource {name}",
                f"MIG resources are nvidia.com/mig-PROFILE; profiles: {sorted(PROFILES)}.",
            )
        elif slice_ and int(slice_[2]) < LEAST_GB:
            yield (
                f"{name} has less than {LEAST_GB} GB",
                "Take the next larger profile; overlays/mig/vision.yaml lists them.",
            )
        if name not in resources.get("limits", {}):
            yield f"{name} is requested without a limit", "GPUs are named under `limits`; the request follows from it."
        if workload.component != "vision":
            yield f"it asks for {name}", "Only the vision server computes on a GPU."


def _probed(objects: Objects, workload: Workload) -> Wrong:
    container = workload.container
    probes: dict[str, Object] = {
        kind: container.get(f"{kind}Probe", {}) for kind in ("startup", "readiness", "liveness")
    }
    if missing := [kind for kind, probe in probes.items() if not probe]:
        yield f"it has no {', '.join(missing)} probe", "See base/vision.yaml and base/worker.yaml."
        return
    if ready := READY_NAMES.get(workload.component):
        ports = {port["containerPort"] for port in container.get("ports", ())}
        names = {"startup": {ready, LIVENESS}, "readiness": {ready}, "liveness": {LIVENESS}}
        for kind, probe in probes.items():
            asked = probe.get("grpc", {})
            if asked.get("port") not in ports:
                yield (
                    f"the {kind} probe is not gRPC on one of its ports {sorted(ports)}",
                    "grpc: {port: …, service: …}.",
                )
            elif asked.get("service") not in names[kind]:
                known = " or ".join(repr(name) for name in sorted(names[kind]))
                yield f"the {kind} probe asks for {asked.get('service')!r}", f"The server's name for it is {known}."
    startup_s = probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"]
    if workload.component == "vision":
        if startup_s < LOADING_S:
            yield (
                f"it has {startup_s} s to load its models",
                f"Raise the startup probe's failureThreshold: {LOADING_S} s at least.",
            )
        if workload.spec.get("progressDeadlineSeconds", 600) <= startup_s:
            yield "a rollout is given up before the models have loaded", f"progressDeadlineSeconds above {startup_s}."
    silent_s = probes["liveness"]["periodSeconds"] * probes["liveness"]["failureThreshold"]
    if silent_s < SILENT_S or probes["liveness"].get("timeoutSeconds", 1) < 5:
        yield (
            f"it is killed after {silent_s} s of silence",
            f"A busy server is not dead: {SILENT_S} s, time-outs of 5 s or more.",
        )


def _drained(objects: Objects, workload: Workload) -> Wrong:
    grace_s = workload.pod.get("terminationGracePeriodSeconds", 30)
    needed_s = settings.stop_s(objects, workload)
    if needed_s and grace_s < needed_s + 10:
        yield (
            f"it is killed {grace_s} s after SIGTERM, and may need {needed_s:g} s to end",
            f"terminationGracePeriodSeconds: {needed_s + 10:g} or more: SERVING_UNREADY_SECONDS + SERVING_DRAIN_SECONDS + "
            f"{LINGER_SECONDS:g} s for last words (of a worker QUEUE_STOP_S), and 10 s to clean up.",
        )
    worker = objects.workload("worker")
    if workload.component == "vision" and worker:
        drain_s, call_s = settings.drain_s(objects, workload), settings.worker(objects, worker).vision_call_s
        if drain_s < call_s:
            yield (
                f"it drains for {drain_s:g} s, and a worker's call may take {call_s:g} s",
                "SERVING_DRAIN_SECONDS of the vision server not below QUEUE_VISION_CALL_S of the workers.",
            )


def _replaced(objects: Objects, workload: Workload) -> Wrong:
    """An update takes no pod away before its successor is ready, unless there is but one GPU to be had."""
    if workload.document["kind"] != "Deployment":
        return
    strategy = workload.spec.get("strategy", {})
    rolling = strategy.get("rollingUpdate") or {}
    if strategy.get("type") == "Recreate":
        gpu = any(name.startswith("nvidia.com/") for name in workload.container["resources"]["limits"])
        if not gpu or workload.spec.get("replicas") != 1:
            yield (
                "an update stops it before the new one is ready",
                "RollingUpdate with maxUnavailable 0 and maxSurge 1.",
            )
    elif rolling.get("maxUnavailable") != 0 or not rolling.get("maxSurge"):
        yield "an update may take ready pods away first", "rollingUpdate: maxUnavailable 0, maxSurge 1."
