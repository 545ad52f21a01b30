"""What is wrong with a manifest is found, and told with its cure: one fault planted at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest

from deploy.kubernetes import check, network_rules
from deploy.kubernetes.objects import Objects
from tests.delivery.manifests import at, container, environment, pod, policy, rendered, without

Plant = Callable[[Objects], Objects | None]
FAULTS: list[tuple[str, Plant, str]] = [
    # Its form.
    ("cpu", lambda o: container(o, "vision").update(readynessProbe={}), "'readynessProbe' was unexpected"),
    ("cpu", lambda o: container(o, "queue")["ports"][0].update(containerPort="2003"), "is not of type 'integer'"),
    (
        "cpu",
        lambda o: at(o, "Deployment", "ai4thai-queue").update(apiVersion="apps/v2"),
        "has no Deployment of apps/v2",
    ),
    (
        "production",
        lambda o: at(o, "ScaledObject", "ai4thai-worker")["spec"].update(maxReplicas=9),
        "'maxReplicas' was unexp",
    ),
    # A pod by itself.
    ("cpu", lambda o: pod(o, "vision")["securityContext"].update(runAsUser=0), "runAsUser"),
    ("cpu", lambda o: pod(o, "queue")["securityContext"].pop("seccompProfile"), "seccompProfile"),
    ("cpu", lambda o: pod(o, "worker")["securityContext"].update(runAsNonRoot=False), "runAsNonRoot"),
    ("cpu", lambda o: container(o, "redis")["securityContext"].update(readOnlyRootFilesystem=False), "readOnlyRoot"),
    ("h100", lambda o: container(o, "vision")["securityContext"].pop("capabilities"), "capabilities"),
    ("cpu", lambda o: container(o, "worker")["securityContext"].pop("allowPrivilegeEscalation"), "allowPrivilege"),
    ("cpu", lambda o: pod(o, "vision").update(automountServiceAccountToken=True), "automountServiceAccountToken"),
    ("cpu", lambda o: pod(o, "queue").update(enableServiceLinks=True), "enableServiceLinks"),
    ("cpu", lambda o: pod(o, "vision").update(hostNetwork=True), "namespace with its node"),
    ("cpu", lambda o: pod(o, "worker")["volumes"].append({"name": "x", "hostPath": {"path": "/"}}), "hostPath"),
    ("cpu", lambda o: container(o, "vision").update(image="team10-vision"), "is not pinned"),
    ("cpu", lambda o: container(o, "queue").update(image="localhost:5000/team10-queue"), "is not pinned"),
    ("cpu", lambda o: container(o, "queue").update(image="registry.example.com/queue:1"), "only an example"),
    ("cpu", lambda o: container(o, "worker")["resources"]["limits"].pop("memory"), "memory has no request or no limit"),
    ("cpu", lambda o: container(o, "worker")["resources"]["limits"].update(cpu="100m"), "above the limit"),
    ("cpu", lambda o: pod(o, "vision")["volumes"][0]["emptyDir"].clear(), "no sizeLimit"),
    ("cpu", lambda o: container(o, "vision")["volumeMounts"].pop(), "not mounted"),
    (
        "mig",
        lambda o: container(o, "vision")["resources"]["limits"].update({"nvidia.com/mig-1g.16gb": 1}),
        "no resource",
    ),
    (
        "mig",
        lambda o: container(o, "vision")["resources"]["limits"].update({"nvidia.com/mig-1g.10gb": 1}),
        "less than 16",
    ),
    ("cpu", lambda o: container(o, "worker")["resources"]["limits"].update({"nvidia.com/gpu": 1}), "asks for nvidia"),
    ("cpu", lambda o: container(o, "queue").pop("livenessProbe"), "no liveness probe"),
    ("cpu", lambda o: container(o, "vision")["livenessProbe"]["grpc"].update(service="vision"), "asks for 'vision'"),
    (
        "cpu",
        lambda o: container(o, "queue")["livenessProbe"]["grpc"].update(service="ai4thai.queue.v1.QueueService"),
        "the liveness probe asks for",
    ),
    (
        "cpu",
        lambda o: container(o, "queue")["readinessProbe"]["grpc"].update(port=2001),
        "not gRPC on one of its ports",
    ),
    ("h100", lambda o: container(o, "vision")["startupProbe"].update(failureThreshold=6), "60 s to load"),
    ("h100", lambda o: at(o, "Deployment", "ai4thai-vision")["spec"].pop("progressDeadlineSeconds"), "given up before"),
    ("cpu", lambda o: container(o, "vision")["livenessProbe"].update(failureThreshold=1), "killed after 15 s"),
    ("cpu", lambda o: pod(o, "vision").update(terminationGracePeriodSeconds=60), "killed 60 s after SIGTERM"),
    ("cpu", lambda o: pod(o, "worker").update(terminationGracePeriodSeconds=10), "killed 10 s after SIGTERM"),
    ("cpu", lambda o: environment(o, "queue").update(SERVING_DRAIN_SECONDS="600"), "may need 615 s"),
    ("cpu", lambda o: environment(o, "worker").update(QUEUE_VISION_CALL_S="900"), "a worker's call may take 900 s"),
    (
        "mig",
        lambda o: at(o, "Deployment", "ai4thai-vision")["spec"].update(strategy={"type": "Recreate"}),
        "an update stops",
    ),
    (
        "cpu",
        lambda o: at(o, "Deployment", "ai4thai-queue")["spec"]["strategy"]["rollingUpdate"].update(maxUnavailable=1),
        "take ready pods away",
    ),
    # Its settings.
    ("cpu", lambda o: environment(o, "vision").update(VISION_MAX_BATCHES="4"), "VISION_MAX_BATCHES is no setting"),
    ("cpu", lambda o: environment(o, "worker").update(QUEUE_WORKER_THREADS="many"), "WorkerSettings refuses"),
    ("cpu", lambda o: environment(o, "store").update(REDIS_URL="http://ai4thai-redis"), "refuses its environment"),
    ("cpu", lambda o: environment(o, "worker").update(QUEUE_WORKER_THREADS="16"), "/tmp has room for"),
    (
        "cpu",
        lambda o: environment(o, "redis").update({"redis.conf": "appendonly yes\nmaxmemory 3gb\n"}),
        "`maxmemory-policy noeviction`",
    ),
    ("cpu", lambda o: container(o, "redis")["resources"]["limits"].update(memory="4Gi"), "room for a rewrite"),
    # What names what.
    ("cpu", lambda o: at(o, "Service", "ai4thai-vision")["spec"]["selector"].update(x="y"), "selects 0 workloads"),
    ("cpu", lambda o: at(o, "Service", "ai4thai-queue")["spec"]["ports"][0].update(port=2001), "port 2001 leads to"),
    (
        "cpu",
        lambda o: at(o, "Deployment", "ai4thai-queue")["spec"]["selector"]["matchLabels"].update(x="y"),
        "does not take its own pods",
    ),
    ("cpu", lambda o: without(o, "PodDisruptionBudget", "ai4thai-worker"), "0 PodDisruptionBudgets"),
    (
        "cpu",
        lambda o: at(o, "PodDisruptionBudget", "ai4thai-vision")["spec"].update(maxUnavailable=0),
        "block the emptying",
    ),
    ("cpu", lambda o: at(o, "Deployment", "ai4thai-vision")["spec"].update(replicas=2), "has `replicas` too"),
    ("cpu", lambda o: without(o, "HorizontalPodAutoscaler", "ai4thai-queue"), "nobody says how many"),
    (
        "cpu",
        lambda o: at(o, "HorizontalPodAutoscaler", "ai4thai-queue")["spec"]["scaleTargetRef"].update(name="queue"),
        "there is no Deployment queue",
    ),
    ("cpu", lambda o: pod(o, "vision")["volumes"][2]["secret"].update(secretName="token"), "that nobody makes"),
    (
        "cpu",
        lambda o: Objects(o.overlay, (*o.documents, {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}})),
        "a secret lies in the repository",
    ),
    ("cpu", lambda o: container(o, "worker")["envFrom"][0]["configMapRef"].update(name="store"), "which is not there"),
    ("cpu", lambda o: environment(o, "worker").update(QUEUE_VISION_ADDRESS="ai4thai-vision:2001"), "one pod alone"),
    (
        "cpu",
        lambda o: environment(o, "worker").update(QUEUE_VISION_ADDRESS="ai4thai-vision-headless:2003"),
        "has that port",
    ),
    ("cpu", lambda o: environment(o, "store").update(REDIS_URL="redis://redis:6379/0"), "names redis:6379"),
    (
        "production",
        lambda o: at(o, "ScaledObject", "ai4thai-worker")["spec"]["triggers"][0]["metadata"].update(
            url="http://ai4thai-queue:2003/queue/depth?queue=*"
        ),
        "from KEDA's namespace",
    ),
    (
        "production",
        lambda o: at(o, "ScaledObject", "ai4thai-worker")["spec"]["triggers"][0]["metadata"].update(
            url="http://ai4thai-queue.ai4thai.svc:2003/queue/depth?queue=default"
        ),
        "does not ask the queue server for every queue",
    ),
    ("production", lambda o: environment(o, "worker").update(QUEUE_WORKER_THREADS="4"), "targetValue is not 4"),
    (
        "mig",
        lambda o: at(o, "PersistentVolumeClaim", "ai4thai-models")["spec"].update(accessModes=["ReadWriteOnce"]),
        "several pods mount it",
    ),
    # Who may speak to whom.
    ("cpu", lambda o: without(o, "NetworkPolicy", "names"), "vision cannot reach DNS on port 53"),
    ("cpu", lambda o: without(o, "NetworkPolicy", "nothing"), "a stranger in our namespace may"),
    ("cpu", lambda o: without(o, "NetworkPolicy", "to-redis"), "worker cannot reach redis"),
    ("cpu", lambda o: policy(o, "redis").update(ingress=[{}]), "another namespace may reach redis"),
    ("cpu", lambda o: policy(o, "vision")["ingress"][0].pop("ports"), "on port 53, and nobody needs"),
    ("cpu", lambda o: policy(o, "queue")["egress"][0]["to"][0]["ipBlock"].pop("except"), "the cloud's metadata"),
    ("h100", lambda o: without(o, "NetworkPolicy", "vision-fetches"), "vision cannot reach a public address"),
    ("production", lambda o: without(o, "NetworkPolicy", "keda"), "KEDA cannot reach queue"),
]


@pytest.mark.parametrize(("overlay", "plant", "words"), FAULTS, ids=[words.replace(" ", "-") for _, _, words in FAULTS])
def test_a_fault_is_caught(overlay: str, plant: Plant, words: str) -> None:
    found = copy.deepcopy(rendered(overlay))
    planted = plant(found)
    findings = check.findings(planted if isinstance(planted, Objects) else found)
    assert any(words in finding.wrong for finding in findings), findings
    assert all(finding.cure and overlay in finding.path for finding in findings)


def test_a_pod_of_our_namespace_gets_nowhere_by_being_let_in_alone() -> None:
    # Given that the vision server lets in any pod of its namespace, an edge, say
    found = copy.deepcopy(rendered("cpu"))
    policy(found, "vision")["ingress"][0]["from"].append({"podSelector": {}})
    flow = ("a stranger in our namespace", "vision", 2001)
    # Then the policy `nothing` still keeps that pod from calling
    assert flow not in set(network_rules.flows(found.of("NetworkPolicy")))
    assert flow in set(network_rules.flows(without(found, "NetworkPolicy", "nothing").of("NetworkPolicy")))
