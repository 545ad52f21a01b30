"""Every object has the form that the Kubernetes API, or its own CustomResourceDefinition, asks for.

The API's schemas come with kubernetes-validate, strict: a misspelt field is refused, where a cluster would drop it silently.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import referencing

from deploy.kubernetes.objects import HERE, Objects
from deploy.validation.findings import Finding

# The oldest and the newest release that the manifests are held against; gRPC probes are general since 1.27.
VERSIONS = ("1.30", "1.37")


def check(objects: Objects) -> Iterator[Finding]:
    """What does not fit its schema."""
    for document in objects.documents:
        # By its text: most objects are the same in several overlays.
        for where, message in _differences(json.dumps(document, sort_keys=True)):
            yield objects.wrong(
                document,
                f"{where}: {message}",
                "Mend the field in deploy/kubernetes; `kubectl explain KIND.FIELD` tells what it takes.",
            )


@functools.cache
def _differences(text: str) -> tuple[tuple[str, str], ...]:
    """Where and how an object differs from its schema, by the first version that says so."""
    document = json.loads(text)
    kind, api = str(document.get("kind")), str(document.get("apiVersion"))
    own = HERE / "schemas" / f"{kind}-{api.replace('/', '-')}.json".lower()
    for version in ("",) if own.exists() else VERSIONS:
        validator = _read(own) if own.exists() else _validator(kind, api, version)
        if validator is None:
            why = f"Kubernetes {version} has no {kind} of {api}, and deploy/kubernetes/schemas no {own.name}"
            return (("apiVersion", why),)
        if error := jsonschema.exceptions.best_match(validator.iter_errors(document)):
            return ((error.json_path + (f" (Kubernetes {version})" if version else ""), error.message),)
    return ()


@functools.cache
def _read(file: Any) -> jsonschema.protocols.Validator:
    schema = json.loads(file.read_text())
    return jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())


@functools.cache
def _validator(kind: str, api: str, version: str) -> jsonschema.protocols.Validator | None:
    """For a kind; None: that version has none. As kubernetes_validate.validate makes it, but once instead of for each object."""
    group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api)  # networking.k8s.io/v1 is networking-v1
    file = _folder(version) / f"{kind.lower()}-{group}.json"
    if not file.is_file():
        return None
    return jsonschema.Draft202012Validator(json.loads(file.read_text()), registry=_definitions(version))


@functools.cache
def _definitions(version: str) -> referencing.Registry[Any]:
    contents = json.loads((_folder(version) / "_definitions.json").read_text())
    return referencing.Resource.from_contents(contents) @ referencing.Registry()


def _folder(version: str) -> Any:
    """Closed at both ends: `additionalProperties: false` everywhere."""
    schemas = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema"
    return schemas / f"v{version}.0-local-strict"
