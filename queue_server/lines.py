"""The fields of every log line that tells of a job, so that a job's life can be followed through all processes."""

from __future__ import annotations

from collections.abc import Sequence

from queue_server.jobs import Job
from serving.traces import trace_id_of


def of_job(job: Job) -> dict[str, str]:
    """The fields of a job that has been read."""
    return of_row((job.job_id, job.request_id, job.trace))


def of_row(row: Sequence[str]) -> dict[str, str]:
    """The fields of a job that a script tells of: its id, the submitter's name for it, its trace; what is empty is left out."""
    job_id, request_id, trace = row[:3]
    fields = {"job_id": job_id}
    if request_id:
        fields["client_request_id"] = request_id
    if trace:
        fields["trace_id"] = trace_id_of(trace)
    return fields
