"""The streams that are open: so many and no more, sharing each model fairly, told when the server leaves."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from weakref import WeakValueDictionary

from vision_server import metrics
from vision_server.detections import Detections
from vision_server.errors import Draining, StreamsFull
from vision_server.fair import FairGate
from vision_server.images import Images
from vision_server.requests import Frame, Priority, StreamOptions
from vision_server.results import StreamSummary
from vision_server.stream import FrameOutcome, Stream


class Streams:
    """Opens streams. Lives on one event loop."""

    def __init__(self, detections: Detections, images: Images, *, max_streams: int) -> None:
        self._detections = detections
        self._images = images
        self._max_streams = max_streams
        self._open: set[Stream] = set()
        # One gate a model and priority, for as long as streams use it: whose turn it is among priorities is the batcher's affair.
        self._gates: WeakValueDictionary[tuple[str, Priority], FairGate] = WeakValueDictionary()
        self._draining = False

    async def detect(
        self, frames: AsyncIterator[Frame], options: StreamOptions, deadline_s: float | None = None
    ) -> AsyncGenerator[FrameOutcome | StreamSummary, None]:
        """The outcome of each frame in their order, then a summary; `deadline_s` is a moment of time.perf_counter().

        Raises what is wrong with the options, StreamsFull, Draining, and what `frames` raises.
        """
        self._detections.check_stream(options)
        if self._draining:
            raise Draining
        if len(self._open) >= self._max_streams:
            raise StreamsFull(self._max_streams)
        stream = Stream(frames, options, deadline_s, self._detections, self._images, self._gate(options))
        self._open.add(stream)
        metrics.STREAMS.inc()
        try:
            async with aclosing(stream.outcomes()) as outcomes:
                async for outcome in outcomes:
                    yield outcome
        finally:
            metrics.STREAMS.dec()
            self._open.discard(stream)

    def drain(self) -> None:
        """Ends every stream once the frames it has read are answered; new ones are refused."""
        self._draining = True
        for stream in self._open:
            stream.end_reading()

    def _gate(self, options: StreamOptions) -> FairGate:
        model, room = self._detections.capacity(options.detect)
        gate = self._gates.get((model, options.priority))
        if gate is None:
            gate = self._gates[model, options.priority] = FairGate(room)
        return gate
