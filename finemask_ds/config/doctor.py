"""What `finemask doctor` looks at."""

from __future__ import annotations

from dataclasses import dataclass

from finemask_ds.config.knobs import Config, knob


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(Config):
    """Is this machine, or this cluster, fit for a long run: one line for each finding, with what to type."""

    ranks: int = knob(0, "processes that the run is to have; 0: any number", unit="ranks")
    run: str = knob("runs", "folder that the run is to write to, which all hosts must share")
    model: str = knob("", "model that every host must find: hub name, folder or 'builtin'; empty: not looked for")
    data: str = knob("", "text that every host must find, as of launcher/tamt.py; empty: not looked for")
    deepspeed: str = knob("", "DeepSpeed file of the run, for what it will compute in; empty: not looked at")
    time_out_sec: int = knob(120, "everything ends after so long, whatever hangs", unit="seconds", least=1)

    @property
    def method(self) -> str:
        """``doctor``."""
        return "doctor"
