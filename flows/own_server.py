"""A temporary Prefect server of our own. To import this costs all of Prefect's server: two seconds of CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import prefect
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import get_current_settings

from tasks.process import dying_with_us


class OwnServer(SubprocessASGIServer):
    """Prefect's temporary server, out of reach of the signals meant for us, and ended by the kernel when we die.

    Ctrl-C and a service manager's SIGTERM go to a whole process group: a server in ours would be gone before the
    run can record its end.
    """

    def _run_uvicorn_command(self) -> subprocess.Popen[Any]:
        app = ["--app-dir", str(prefect.__module_path__.parent), "--factory", "prefect.server.api.server:create_app"]
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--log-level", "error", "--lifespan", "on"]
        ephemeral = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
        settings = get_current_settings().to_environment_variables(exclude_unset=True)
        return subprocess.Popen(
            dying_with_us([sys.executable, "-m", "uvicorn", *app, *where], by="TERM"),
            env={**os.environ, **settings, **ephemeral},
            start_new_session=True,
        )
