"""What the operator can set about the queue server and its workers."""

from __future__ import annotations

from pydantic import AliasChoices, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

_HOUR_S = 3600.0


class StoreSettings(BaseSettings):
    """What the queue server and the workers must agree on: where Redis is, how long things are kept."""

    model_config = SettingsConfigDict(env_prefix="QUEUE_", extra="ignore", populate_by_name=True)

    redis_url: str = Field(
        default="",
        validation_alias=AliasChoices("REDIS_URL", "redis_url"),
        description="Where Redis (6.2 or newer, or Valkey) is: `redis://[user:password@]host:port/db`, `rediss://…` for TLS. "
        "Empty: localhost at REDIS_PORT.",
    )
    redis_port: int = Field(
        default=6379,
        ge=1,
        le=65535,
        validation_alias=AliasChoices("REDIS_PORT", "redis_port"),
        description="Redis' port on this machine, when REDIS_URL is empty.",
    )
    keep_ended_s: float = Field(
        default=24 * _HOUR_S, gt=0, description="Ended jobs and their results are kept this long."
    )
    keep_failed_s: float = Field(default=7 * 24 * _HOUR_S, gt=0, description="FAILED jobs are kept this long.")
    keep_request_id_s: float = Field(
        default=24 * _HOUR_S, gt=0, description="The same request_id gives the same job for this long."
    )
    keep_media_s: float = Field(default=_HOUR_S, gt=0, description="An image that no job needs is kept this long.")
    lease_s: float = Field(
        default=15.0, gt=0, description="A worker that has not been heard of for this long has lost its jobs to others."
    )

    @property
    def keep_ms(self) -> dict[str, int]:
        """How long things are kept, in milliseconds, as the scripts want it."""
        return {
            "ended_ms": round(self.keep_ended_s * 1000),
            "failed_ms": round(self.keep_failed_s * 1000),
            "media_ms": round(self.keep_media_s * 1000),
            "request_id_ms": round(self.keep_request_id_s * 1000),
        }

    @property
    def url(self) -> str:
        """Redis' URL, from REDIS_URL or REDIS_PORT."""
        return self.redis_url or f"redis://127.0.0.1:{self.redis_port}/0"


class QueueSettings(StoreSettings):
    """Settings of the queue server; environment variables are named QUEUE_… unless said otherwise."""

    port: int = Field(
        default=2003,
        ge=0,
        le=65535,
        validation_alias=AliasChoices("QUEUE_WORKER_PORT", "port"),
        description="QUEUE_WORKER_PORT: gRPC and HTTP on one port. 0: any free one.",
    )
    max_depth: int = Field(default=10_000, ge=1, description="Jobs that wait, QUEUED and SCHEDULED; more are refused.")
    max_queues: int = Field(default=100, ge=1, description="Different queue names; more are refused.")
    max_image_bytes: int = Field(default=20_000_000, ge=1, description="Bytes of one image.")
    max_request_bytes: int = Field(default=60 << 20, ge=1, description="Bytes of one submission, images included.")
    max_memory_share: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="Submissions are refused while Redis uses more than this share of its maxmemory.",
    )
    max_watchers: int = Field(default=1000, ge=1, description="WatchJob calls at once; more are refused.")
    default_max_attempts: int = Field(default=3, ge=1, le=20, description="Attempts of a job that does not say.")
    store_timeout_s: float = Field(
        default=2.0, gt=0, description="Redis must answer within this time, otherwise UNAVAILABLE."
    )
    sweep_s: float = Field(
        default=1.0,
        gt=0,
        description="Due, lost, overdue and expired jobs are looked for this often; the clock of not_before_time.",
    )
    overdue_s: float = Field(
        default=30.0, gt=0, description="A job whose message nobody has is sent again after this time."
    )


class WorkerSettings(StoreSettings):
    """Settings of a worker process; environment variables are named QUEUE_… unless said otherwise."""

    vision_address: str = Field(
        default="localhost:2001",
        description="The vision server: `host:port`, `grpcs://host:port` for TLS, or a gRPC target.",
    )
    worker_threads: int = Field(default=8, ge=1, le=256, description="Jobs that one worker process runs at once.")
    images_in_flight: int = Field(
        default=4, ge=1, le=64, description="Images of one job that are at the vision server at once."
    )
    vision_call_s: float = Field(
        default=300.0, gt=0, description="A call to the vision server that takes longer has failed."
    )
    vision_connect_s: float = Field(
        default=5.0, gt=0, description="The vision server must be reachable within this time when an attempt begins."
    )
    renew_s: float = Field(
        default=5.0, gt=0, description="How often a running job's lease is renewed; well below the lease."
    )
    watch_s: float = Field(
        default=0.5, gt=0, description="How often running jobs are looked at for a request to cancel."
    )
    retry_first_s: float = Field(default=1.0, gt=0, description="The wait before the first retry; doubled each time.")
    retry_limit_s: float = Field(default=60.0, gt=0, description="The longest wait before a retry.")
    circuit_limit_s: float = Field(
        default=15.0,
        gt=0,
        description="While the vision server is away or full, no job is begun for at most this long at a time.",
    )
    max_result_bytes: int = Field(
        default=48 << 20, ge=1, description="Bytes of one result; a larger one fails the job."
    )
    stop_s: float = Field(
        default=10.0, gt=0, description="On SIGTERM the running jobs are given back within this time."
    )
    log_level: str = Field(
        default="info",
        validation_alias=AliasChoices("SERVING_LOG_LEVEL", "log_level"),
        description="SERVING_LOG_LEVEL: debug, info, warning or error.",
    )
    log_format: str = Field(
        default="auto",
        validation_alias=AliasChoices("SERVING_LOG_FORMAT", "log_format"),
        description="SERVING_LOG_FORMAT: auto, json or console.",
    )
