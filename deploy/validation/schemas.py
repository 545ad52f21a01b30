"""A file held against a published JSON schema, as check-jsonschema brings it."""

from __future__ import annotations

from collections.abc import Iterator

import yaml

from deploy.validation import yaml_lines
from deploy.validation.findings import Finding
from deploy.validation.tree import Tree


def schema_findings(tree: Tree, file: str, schema: str, cure: str) -> Iterator[Finding]:
    """What the schema says against the file; `schema` is one of check-jsonschema's names, such as vendor.gitlab-ci."""
    # Here, since their import takes seconds, which only the first of the checks pays.
    import jsonschema
    from check_jsonschema.builtin_schemas import get_builtin_schema

    try:
        documents = yaml_lines.read_all(tree.read(file))
        content = yaml_lines.values(tree.read(file))
    except yaml.YAMLError as error:
        line, problem = yaml_lines.error_place(error)
        yield Finding(file, line, f"it is not YAML: {problem}", cure)
        return
    published = get_builtin_schema(schema)
    for complaint in jsonschema.validators.validator_for(published)(published).iter_errors(content):
        # Of what it might have been (`oneOf`), the nearest tells what is meant.
        nearest = jsonschema.exceptions.best_match([complaint]) or complaint
        path = [str(step) for step in nearest.absolute_path]
        wrong = f"{'.'.join(path) or 'the file'}: {nearest.message[:500]}"
        yield Finding(file, yaml_lines.line_of(documents, *path) or 1, wrong, cure)
