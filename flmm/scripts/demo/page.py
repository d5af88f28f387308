"""A local page: choose a picture, type phrases or nothing, and see masks light up as the pointer moves over
words.

    python flmm/scripts/demo/page.py --config CONFIG --head head.safetensors      # then open http://127.0.0.1:8000

Without --config and --head the model of the built-in study is used. The server needs the standard library
only; the page itself is page.html. It answers to this machine alone, and only to its own page: another site
that your browser has open can neither send it pictures nor read what it answers.
"""

import base64
import io
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
from PIL import Image

from common.arguments import Parser, number
from common.errors import UserError, run
from flmm.data.transforms import to_rgb, upright
from flmm.draw import colours
from flmm.scripts.demo.grounded_conversation_demo import add_model_arguments, load_grounder

LARGEST = 30 * 2**20  # bytes of an uploaded picture
PIXELS = 50_000_000  # of a picture: few bytes can hold very many
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
PATIENCE = 20  # seconds that a client may be silent
PAGE = Path(__file__).with_suffix(".html")


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_model_arguments(parser)
    parser.add_argument("--port", type=number(int, 0, 65535), default=8000, help="port on this machine")
    return parser.parse_args(argv)


def data_url(image):
    """PIL image as a PNG data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def mask_layer(mask, colour):
    """(H, W) bool mask as a picture in one colour (RGB) that is transparent outside the mask."""
    pixels = np.full((*mask.shape, 3), colour, np.uint8)
    return data_url(Image.fromarray(np.dstack([pixels, mask.astype(np.uint8) * 255])))


def reply(grounder, content, text):
    """What the page draws for the bytes of a picture and the typed text; {"error"} in one line for what a
    user can mend."""
    try:
        opened = Image.open(io.BytesIO(content), formats=FORMATS)
        if opened.width * opened.height > PIXELS:
            return {"error": f"the picture has more than {PIXELS // 10**6} million pixels; make it smaller"}
        image = to_rgb(upright(opened))
        image.thumbnail((1600, 1600))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return {"error": f"not a readable picture of the kinds {', '.join(FORMATS)} ({type(error).__name__})"}
    try:
        phrases = [phrase.strip() for phrase in text.replace("；", ";").split(";")] if text.strip() else None
        result = grounder.ground(image, phrases) if phrases else grounder.converse(image)
    except UserError as error:
        return {"error": str(error)}
    tints = colours(len(result["phrases"]))
    return {
        "image": data_url(image),
        "answer": result.get("answer", ""),
        "phrases": result["phrases"],
        "scores": result["scores"],
        "presence": result["presence"] if result["calibrated"] else None,
        "masks": [mask_layer(mask, tint) for mask, tint in zip(result["masks"], tints)],
        "colours": ["rgb({}, {}, {})".format(*tint) for tint in tints],
    }


class Handler(BaseHTTPRequestHandler):
    """GET gives the page, POST /ground?text=... with a picture its masks."""

    timeout = PATIENCE

    def send(self, kind, content, status=200):
        body = content.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status, reason):
        """One line as JSON; what the client has still to send is not read."""
        self.close_connection = True
        self.send("application/json", json.dumps({"error": reason}), status)

    def reason_to_refuse(self, path):
        """(status, reason) where a request is not for `path` of this server, else None.

        It must name this machine and come from this page or from no page at all: a name that leads here by
        way of a foreign DNS server, or a foreign page, is refused.
        """
        hosts = {f"{name}:{self.server.server_port}" for name in ("127.0.0.1", "localhost")}
        named, origin = self.headers.get_all("Host") or [], self.headers.get("Origin")
        foreign = origin is not None and origin.lower() not in {f"http://{host}" for host in hosts}
        if foreign or len(named) != 1 or named[0].lower() not in hosts:
            return 403, "this server answers to its own page on this machine only"
        return None if urlparse(self.path).path == path else (404, "there is nothing here")

    def do_GET(self):
        if refusal := self.reason_to_refuse("/"):
            self.refuse(*refusal)
        else:
            self.send("text/html; charset=utf-8", PAGE.read_text(encoding="utf-8"))

    def do_POST(self):
        refusal, length = self.reason_to_refuse("/ground"), self.headers.get("Content-Length", "")
        if refusal is None and not (length.isascii() and length.isdecimal()):
            refusal = 411, "the length of the picture is missing"
        # of very many digits Python makes no number
        if refusal is None and (len(length) > 20 or int(length) > LARGEST):
            refusal = 413, f"the picture is larger than {LARGEST // 2**20} MiB"
        if refusal is not None:
            self.refuse(*refusal)
            return
        content = self.rfile.read(int(length))
        if len(content) < int(length):
            self.refuse(400, "the picture was cut off")
            return
        text = parse_qs(urlparse(self.path).query).get("text", [""])[0]
        try:
            with self.server.turn:
                answer = reply(self.server.grounder, content, text)
        except Exception:
            self.refuse(500, "the model failed; the terminal of this server says why")
            raise
        self.send("application/json", json.dumps(answer))

    def log_message(self, *args):
        """Keep the terminal quiet."""


class Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """A client that went away is no news; anything else is."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def make_server(grounder, port):
    """Server of the page on this machine.

    Every client has a thread, so that one that sends nothing keeps nobody waiting; the model works for one at
    a time.
    """
    server = Server(("127.0.0.1", port), Handler)
    server.grounder, server.turn = grounder, threading.Lock()
    return server


def main(args):
    grounder = load_grounder(args)
    try:
        server = make_server(grounder, args.port)
    except OSError as error:
        raise UserError(f"--port {args.port}: {error.strerror}; choose another") from error
    print(f"open http://127.0.0.1:{server.server_port} (Ctrl-C ends it)")
    server.serve_forever()


if __name__ == "__main__":
    run(main, parse_args())
