"""A local page: choose a picture, type phrases or nothing, and see masks light up as the pointer moves over
words.

    python flmm/scripts/demo/page.py --config CONFIG --head head.safetensors      # then open http://127.0.0.1:8000

Without --config and --head the model of the built-in study is used. The server needs the standard library
only and answers to this machine alone; the page itself is page.html.
"""

import base64
import io
import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

# repository root: every way of starting this file finds it
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import numpy as np
from PIL import Image, ImageOps

from common.arguments import Parser, number
from common.errors import UserError, run
from flmm.data.transforms import to_rgb
from flmm.draw import colours
from flmm.scripts.demo.grounded_conversation_demo import add_model_arguments, load_grounder

LARGEST = 30 * 2**20  # bytes of an uploaded picture
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
        image = to_rgb(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
        image.thumbnail((1600, 1600))
        phrases = [phrase.strip() for phrase in text.split(";")] if text.strip() else None
        result = grounder.ground(image, phrases) if phrases else grounder.converse(image)
    except UserError as error:
        return {"error": str(error)}
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return {"error": f"not a readable picture ({type(error).__name__})"}
    tints = colours(len(result["phrases"]))
    return {
        "image": data_url(image),
        "answer": result.get("answer", ""),
        "phrases": result["phrases"],
        "scores": result["scores"],
        "masks": [mask_layer(mask, tint) for mask, tint in zip(result["masks"], tints)],
        "colours": ["rgb({}, {}, {})".format(*tint) for tint in tints],
    }


def make_server(grounder, port):
    """HTTP server on this machine: GET gives the page, POST /ground?text=... with a picture its masks."""

    class Handler(BaseHTTPRequestHandler):
        def send(self, kind, content):
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(content.encode())

        def do_GET(self):
            self.send("text/html; charset=utf-8", PAGE.read_text(encoding="utf-8"))

        def do_POST(self):
            size = int(self.headers.get("Content-Length", 0))
            text = parse_qs(urlparse(self.path).query).get("text", [""])[0]
            answer = {"error": "the picture is larger than 30 MiB"}
            if size <= LARGEST:
                answer = reply(grounder, self.rfile.read(size), text)
            self.send("application/json", json.dumps(answer))

        def log_message(self, *args):
            """Keep the terminal quiet."""

    return HTTPServer(("127.0.0.1", port), Handler)


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
