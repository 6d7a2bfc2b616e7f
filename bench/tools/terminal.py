"""The picture at the top of the README: a real session in a real shell, as SVG.

    $ python bench/tools/terminal.py
    wrote bench/terminal.svg

Starts local_server.py, gives bash a pseudo-terminal and types SCENE into it. What comes
back goes through a terminal just large enough for it: lines, columns and the colours
that were really sent. Look at the picture before you commit it: the model is small.
"""

import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from fcntl import ioctl
from html import escape
from itertools import groupby
from pathlib import Path

BENCH = Path(__file__).resolve().parents[1]
COLUMNS, ROWS = 80, 24
PORT = 8080  # the one that llama.cpp's server has by default
STEP_TIMEOUT = 120  # seconds; the answers take about one
QUIET = 1  # seconds of silence after a prompt, before something is typed
STORY = 230  # characters, then it is stopped
# A model this small does not reason by itself. Two examples before the conversation,
# as templates of larger models also have them, show it how; then it says what it likes.
TEMPLATE = """\
<|im_start|>user
How many legs has a spider?<|im_end|>
<|im_start|>assistant
<think>A spider is an arachnid, and all of them have eight legs.</think>\
A spider has eight legs.<|im_end|>
<|im_start|>user
What colour is snow?<|im_end|>
<|im_start|>assistant
<think>Snow is frozen water, which scatters light of every colour.</think>\
Snow is white.<|im_end|>
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

ASK = "python sse_chat.py -o temperature=0"
STOP = "\x03"  # Ctrl-C, typed while an answer comes; all else waits for a prompt
SCENE = (
    "export OPENAI_BASE_URL={url}\n",
    f'echo "What do bees make?" | {ASK} | tr a-z A-Z\n',
    f'{ASK} -c s.json "Tell me a story."\n',
    STOP,
    f"{ASK} -c s.json -o max_tokens=40\n",
    "Go on.\n",
    "What is the capital of Japan?\n",
    "\x04",
    'python sse_chat.py --demo -o tool_choice=required -o tools="$(cat t.json)" hi\n',
)
# The demo server calls it: the model is too small for that.
PROPERTIES = {"city": {"type": "string"}, "days": {"type": "integer"}}
SCHEMA = {"properties": PROPERTIES, "required": [*PROPERTIES]}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]

STYLES = {"2": "dim", "32": "green"}  # by SGR number
ESCAPE = re.compile(r"\x1b\[([0-?]*)[ -/]*([@-~])|\x1b\][^\x07]*\x07|\x1b[=>]")

LINE_HEIGHT, TOP = 21, 64
SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" xml:space="preserve" \
viewBox="0 0 800 {height}" width="800" height="{height}" role="img">
<title>sse_chat.py in a terminal</title>
<style>
text {{ font: 15px ui-monospace, SFMono-Regular, Menlo, Consolas,
  "DejaVu Sans Mono", monospace; fill: #e6edf3; white-space: pre }}
.dim {{ fill: #8d96a0 }}
.green {{ fill: #56d364 }}
</style>
<rect width="800" height="{height}" rx="10" fill="#161b22"/>
<circle cx="24" cy="22" r="6" fill="#ff5f57"/>
<circle cx="44" cy="22" r="6" fill="#febc2e"/>
<circle cx="64" cy="22" r="6" fill="#28c840"/>
{lines}
</svg>
"""

Line = list[tuple[str, str]]  # a character and its style


def play(url: str, folder: str) -> str:
    """Type the scene into a shell that starts in `folder`; give all it printed."""
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": folder,
        "INPUTRC": os.devnull,
        "LANG": "C.UTF-8",
        "TERM": "xterm-256color",
        "PS1": r"\[\e[32m\]$\[\e[0m\] ",
    }
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.execvpe("bash", ["bash", "--noprofile", "--norc"], environment)
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", ROWS, COLUMNS, 0, 0))
    try:
        whole = ""
        for typed in SCENE:
            whole += read(terminal, STORY if typed == STOP else None)
            os.write(terminal, typed.format(url=url).encode())
        return whole + read(terminal)
    finally:
        os.close(terminal)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def read(terminal: int, enough: int | None = None) -> str:
    """Read what is printed until a prompt waits, or `enough` characters have come."""
    output, deadline = b"", time.monotonic() + STEP_TIMEOUT
    while time.monotonic() < deadline:
        text = output.decode(errors="ignore")
        plain = ESCAPE.sub("", text)
        if enough and len(plain) > enough:
            return text
        if select.select([terminal], [], [], QUIET)[0]:
            output += os.read(terminal, 65536)
        elif plain.endswith(" "):
            return text
    sys.exit(f"terminal: no prompt came, but {text!r}")


def emulate(output: str) -> list[Line]:
    """Give the lines as they stand at the end, those scrolled away too."""
    lines: list[Line] = [[]]
    column, style = 0, ""
    for found in re.finditer(f"(?s){ESCAPE.pattern}|.", output):
        text, line = found[0], lines[-1]
        if found[2] == "m":
            style = STYLES.get(found[1], "")
        elif found[2] == "K":  # to the end of the line
            del line[column:]
        elif text == "\n":
            lines.append([])
        elif text == "\r":
            column = 0
        elif text == "\b":
            column -= 1
        elif text >= " ":
            if column == COLUMNS:
                lines.append(line := [])
                column = 0
            line += [(" ", "")] * (column - len(line))
            line[column : column + 1] = [(text, style)]
            column += 1
    return lines


def draw(lines: list[Line]) -> str:
    rows = [(TOP + LINE_HEIGHT * row, spans(line)) for row, line in enumerate(lines)]
    texts = [f'<text x="40" y="{y}">{text}</text>' for y, text in rows if text]
    return SVG.format(height=TOP + LINE_HEIGHT * len(lines), lines="\n".join(texts))


def spans(line: Line) -> str:
    """One <tspan> for each run of one style."""
    parts = []
    for style, cells in groupby(line, key=lambda cell: cell[1]):
        text = escape("".join(character for character, _ in cells), quote=False)
        parts.append(f'<tspan class="{style}">{text}</tspan>' if style else text)
    return "".join(parts)


def main() -> None:
    command = [sys.executable, str(BENCH / "tools/local_server.py"), "--with-parent"]
    command += ["--port", str(PORT), "--chat-template", TEMPLATE]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server,
    ):
        assert server.stdout
        url = server.stdout.readline().strip()
        shutil.copy(BENCH.parent / "sse_chat.py", folder)
        Path(folder, "t.json").write_text(json.dumps(TOOLS))
        try:
            output = play(url, folder) if url else sys.exit("terminal: no server")
        finally:
            server.terminate()
    (BENCH / "terminal.svg").write_text(draw(emulate(output)), encoding="utf-8")


if __name__ == "__main__":
    main()
