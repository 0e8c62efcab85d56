"""A clock that stands until it is told to go, and what compiles by it."""

from gptvq_jax.console.compile_time import CompileTime

BACKEND = "/jax/core/compile/backend_compile_duration"
TRACE = "/jax/core/compile/jaxpr_trace_duration"


class Clock:
    """Seconds; `compiling` collects what `compile` takes."""

    def __init__(self):
        self.now = 0.0
        self.compiling = CompileTime(self)

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds

    def compile(self, seconds: float, event: str = BACKEND) -> None:
        self.now += seconds
        self.compiling.on_event(event, seconds, fun_name="f")
