"""What names what: selectors, services, ConfigMaps, claims, autoscalers; each name leads to something, and to the right one."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from deploy.kubernetes import settings
from deploy.kubernetes.objects import Objects, Workload, first, hosts, selects
from deploy.validation.findings import Finding

# Made by hand, by the commands in docs/deployment.md: no secret lies in a repository.
SECRETS = {"ai4thai-secrets", "ai4thai-bucket", "registry"}


def check(objects: Objects) -> Iterator[Finding]:
    """Names that lead nowhere, or to the wrong thing."""
    for rule in (_selectors, _services, _budgets, _scalers, _references, _addresses, _keda, _claims):
        yield from rule(objects)


def _selectors(objects: Objects) -> Iterator[Finding]:
    for workload in objects.workloads:
        if not workload.component or not selects(workload.spec["selector"], workload.labels):
            yield objects.wrong(
                workload.document, "its selector does not take its own pods", "Give both the same labels."
            )
        for spread in workload.pod.get("topologySpreadConstraints", ()):
            if not selects(spread["labelSelector"], workload.labels):
                yield objects.wrong(workload.document, "it spreads other pods than its own", "The same labels there.")
    for document in objects.documents:
        if document["kind"] != "Namespace" and document["metadata"].get("namespace") != "ai4thai":
            yield objects.wrong(document, "it is not in the namespace ai4thai", "metadata.namespace: ai4thai.")


def _services(objects: Objects) -> Iterator[Finding]:
    for service in objects.of("Service"):
        chosen = [one for one in objects.workloads if selects({"matchLabels": service["spec"]["selector"]}, one.labels)]
        if len(chosen) != 1:
            yield objects.wrong(service, f"it selects {len(chosen)} workloads", "Its selector: the labels of one.")
            continue
        ports = {port["name"]: port["containerPort"] for port in chosen[0].container.get("ports", ())}
        for port in service["spec"]["ports"]:
            if ports.get(port.get("targetPort")) != port["port"]:
                yield objects.wrong(
                    service,
                    f"port {port['port']} leads to {port.get('targetPort')!r}, and {chosen[0].name} has {ports}",
                    "targetPort: the name of a container's port, with the same number.",
                )


def _budgets(objects: Objects) -> Iterator[Finding]:
    budgets = objects.of("PodDisruptionBudget")
    for deployment in objects.of("Deployment"):
        mine = [one for one in budgets if selects(one["spec"]["selector"], Workload(deployment).labels)]
        if len(mine) != 1:
            yield objects.wrong(
                deployment, f"{len(mine)} PodDisruptionBudgets speak of it", "One each: see base/vision.yaml."
            )
        elif mine[0]["spec"].get("maxUnavailable") in (None, 0, "0%"):
            yield objects.wrong(mine[0], "it may block the emptying of a node for ever", "maxUnavailable: 1.")


def _scalers(objects: Objects) -> Iterator[Finding]:
    targets = []
    for scaler in (*objects.of("HorizontalPodAutoscaler"), *objects.of("ScaledObject")):
        name = scaler["spec"]["scaleTargetRef"]["name"]
        target = objects.named("Deployment", name)
        targets.append(name)
        if target is None:
            yield objects.wrong(scaler, f"there is no Deployment {name}", "scaleTargetRef.name: one of this overlay.")
        elif "replicas" in target["spec"]:
            yield objects.wrong(
                target, "it is scaled, and has `replicas` too", "Remove them: each apply would set it back."
            )
    for document in objects.of("Deployment"):
        name = document["metadata"]["name"]
        if targets.count(name) > 1:
            yield objects.wrong(
                document, "two autoscalers pull at it", "One of them: KEDA makes an autoscaler of its own."
            )
        elif not targets.count(name) and "replicas" not in document["spec"]:
            yield objects.wrong(document, "nobody says how many", "`replicas`, or an autoscaler.")


def _references(objects: Objects) -> Iterator[Finding]:
    for secret in objects.of("Secret"):
        yield objects.wrong(
            secret, "a secret lies in the repository", "Make it by kubectl create secret, and delete it here."
        )
    for workload in objects.workloads:
        wanted = [
            ("ConfigMap", one["configMapRef"]["name"])
            for one in workload.container.get("envFrom", ())
            if "configMapRef" in one
        ]
        secrets = [one["secretRef"]["name"] for one in workload.container.get("envFrom", ()) if "secretRef" in one]
        secrets += [one["name"] for one in workload.pod.get("imagePullSecrets", ())]
        for volume in workload.pod.get("volumes", ()):
            if "configMap" in volume:
                wanted.append(("ConfigMap", volume["configMap"]["name"]))
            if "persistentVolumeClaim" in volume:
                wanted.append(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
            secrets += [volume["secret"]["secretName"]] if "secret" in volume else []
            secrets += [
                one["secret"]["name"] for one in volume.get("projected", {}).get("sources", ()) if "secret" in one
            ]
        for kind, name in wanted:
            if objects.named(kind, name) is None:
                yield objects.wrong(
                    workload.document, f"it names a {kind} {name}, which is not there", "Name one that is."
                )
        for name in sorted(set(secrets) - SECRETS):
            yield objects.wrong(
                workload.document, f"it names a secret {name} that nobody makes", f"One of {sorted(SECRETS)}."
            )


def _addresses(objects: Objects) -> Iterator[Finding]:
    for workload in objects.workloads:
        for variable, host, port in hosts(objects.environment(workload)):
            service = objects.named("Service", host)
            if service is None and "." in host:
                continue  # outside
            ports = [] if service is None else [one["port"] for one in service["spec"]["ports"]]
            if port not in ports:
                yield objects.wrong(
                    workload.document,
                    f"{variable} names {host}:{port}, and no Service of that name has that port",
                    f"Services: {sorted(one['metadata']['name'] for one in objects.of('Service'))}.",
                )
            elif variable == "QUEUE_VISION_ADDRESS" and service and service["spec"].get("clusterIP") != "None":
                yield objects.wrong(
                    workload.document,
                    f"{variable} names {host}, behind which one connection reaches one pod alone",
                    "The headless Service, whose name has every pod's address: ai4thai-vision-headless.",
                )


def _keda(objects: Objects) -> Iterator[Finding]:
    for scaled in objects.of("ScaledObject"):
        for trigger in scaled["spec"]["triggers"]:
            place = urlsplit(trigger["metadata"].get("url", ""))
            service, _, rest = (place.hostname or "").partition(".")
            found = objects.named("Service", service)
            right = (f"{found['metadata']['namespace']}.svc", "/queue/depth", "queue=*") if found else ()
            if (rest, place.path, place.query) != right:
                yield objects.wrong(
                    scaled,
                    f"{place.geturl()} does not ask the queue server for every queue from KEDA's namespace",
                    "http://ai4thai-queue.ai4thai.svc:2003/queue/depth?queue=*",
                )
            worker = objects.workload("worker")
            threads = settings.worker(objects, worker).worker_threads if worker else 0
            if trigger["metadata"].get("targetValue") != str(threads):
                yield objects.wrong(
                    scaled, f"targetValue is not {threads}", "As many as a worker's QUEUE_WORKER_THREADS."
                )


def _claims(objects: Objects) -> Iterator[Finding]:
    """A claim that several pods mount, be it for the time of an update, must let several nodes have it."""
    for claim in objects.of("PersistentVolumeClaim"):
        name = claim["metadata"]["name"]
        pods = 0
        for workload in objects.workloads:
            volumes = (one.get("persistentVolumeClaim", {}) for one in workload.pod.get("volumes", ()))
            if first(one for one in volumes if one.get("claimName") == name):
                alone = workload.spec.get("replicas") == 1 and workload.spec["strategy"]["type"] == "Recreate"
                pods += 1 if alone else 2
        if pods == 0:
            yield objects.wrong(claim, "no pod mounts it", "Remove it, or mount it.")
        elif pods > 1 and claim["spec"]["accessModes"] != ["ReadWriteMany"]:
            yield objects.wrong(
                claim, "several pods mount it", "accessModes: [ReadWriteMany], and a storage class that has it."
            )
