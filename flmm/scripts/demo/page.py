"""A local page: choose a picture, type phrases or nothing, and see masks light up as the pointer moves over words.

    python flmm/scripts/demo/page.py --config CONFIG --head head.safetensors      # then open http://127.0.0.1:8000

Without --config and --head the model of the built-in run is used. Standard library only; answers to this machine alone.
"""

import argparse
import base64
import html
import io
import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

sys.path.insert(
    0, str(Path(__file__).resolve().parents[3])
)  # repository root: every way of starting this file finds it

import numpy as np
from PIL import Image, ImageOps

from common.errors import UserError, run
from flmm.build import add_config_arguments, read_config
from flmm.conversation import Grounder
from flmm.data.transforms import to_rgb
from flmm.draw import colours
from flmm.scripts.demo.grounded_conversation_demo import builtin_model

LARGEST = 30 * 2**20  # bytes of an uploaded picture

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Masks for words</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 820px; margin: 2rem auto; padding: 0 1rem; color: #1c2430 }
#stage { position: relative; margin-top: 1rem } #stage img { width: 100%; display: block; border-radius: 6px }
#stage img.mask { position: absolute; inset: 0; opacity: 0; transition: opacity .15s } #stage img.on { opacity: .7 }
.word { border-bottom: 3px solid; cursor: pointer; margin-right: .3em } .word small { color: #5b6675 } .error { color: #b3372b }
form { display: flex; gap: .6em; flex-wrap: wrap } input[type=text] { flex: 1; padding: .4em }</style>
<h1>Masks for words</h1><form><input type="file" accept="image/*" required aria-label="picture">
<input type="text" aria-label="phrases" placeholder="a red car; the man on the left    (empty: describe the picture)">
<button>Ground</button></form>
<p id="answer"></p><div id="stage"></div><script>
const form = document.querySelector("form"), answer = document.querySelector("#answer"), stage = document.querySelector("#stage");
form.onsubmit = async event => {
  event.preventDefault(); answer.textContent = "..."; stage.replaceChildren();
  const file = form.querySelector("[type=file]").files[0], text = form.querySelector("[type=text]").value;
  const reply = await (await fetch("/ground?text=" + encodeURIComponent(text), {method: "POST", body: file})).json();
  answer.replaceChildren(); answer.className = reply.error ? "error" : "";
  if (reply.error) { answer.textContent = reply.error; return; }
  const picture = new Image(); picture.src = reply.image; stage.append(picture);
  picture.onload = () => stage.style.maxWidth = `calc(75vh * ${picture.naturalWidth / picture.naturalHeight})`;  // fits the window
  let rest = reply.answer || "";   // the words of the answer, or the typed phrases one after another
  reply.phrases.forEach((phrase, k) => {
    const mask = new Image(); mask.src = reply.masks[k]; mask.className = "mask"; stage.append(mask);
    const word = document.createElement("span"), score = document.createElement("small");
    word.className = "word"; word.tabIndex = 0; word.style.borderColor = reply.colours[k];
    score.textContent = " " + reply.scores[k].toFixed(2); word.append(phrase, score);
    word.onmouseenter = word.onfocus = () => mask.classList.add("on");
    word.onmouseleave = word.onblur = () => mask.classList.remove("on");
    const at = rest.indexOf(phrase);
    answer.append(at < 0 ? " " : rest.slice(0, at), word);
    rest = at < 0 ? rest : rest.slice(at + phrase.length);
  });
  answer.append(rest);
};</script></html>"""


def data_url(image):
    """PIL image as a PNG data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def reply(grounder, content, text):
    """Bytes of a picture and the typed text -> what the page draws; {"error"} in one line for what a user can mend."""
    try:
        image = to_rgb(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
        image.thumbnail((1600, 1600))
        phrases = [p.strip() for p in text.split(";")] if text.strip() else None
        result = grounder.ground(image, phrases) if phrases else grounder.converse(image)
    except UserError as error:
        return {"error": str(error)}
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return {"error": f"not a readable picture ({html.escape(type(error).__name__)})"}
    tints, layers = colours(len(result["phrases"])), []
    for mask, tint in zip(result["masks"], tints):
        layers.append(
            data_url(
                Image.fromarray(
                    np.dstack([np.full((*mask.shape, 3), tint, np.uint8), mask.astype(np.uint8) * 255])
                )
            )
        )
    return {
        "image": data_url(image),
        "answer": result.get("answer"),
        "phrases": result["phrases"],
        "scores": result["scores"],
        "masks": layers,
        "colours": ["rgb({}, {}, {})".format(*t) for t in tints],
    }


def make_server(grounder, port):
    class Handler(BaseHTTPRequestHandler):
        def send(self, kind, content):
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(content.encode())

        def do_GET(self):
            self.send("text/html; charset=utf-8", PAGE)

        def do_POST(self):
            size = int(self.headers.get("Content-Length", 0))
            text = parse_qs(urlparse(self.path).query).get("text", [""])[0]
            answer = (
                {"error": "the picture is larger than 30 MiB"}
                if size > LARGEST
                else reply(grounder, self.rfile.read(size), text)
            )
            self.send("application/json", json.dumps(answer))

        def log_message(self, *args):
            pass

    return HTTPServer(("127.0.0.1", port), Handler)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser, data=False, required=False)
    parser.add_argument("--head", type=Path, help="trained head, .safetensors or .pth")
    parser.add_argument("--selector", type=Path, help="trained keyword selector")
    parser.add_argument("--port", type=int, default=8000, help="port on this machine (default 8000)")
    return parser.parse_args()


def main(args):
    if bool(args.config) != bool(args.head):
        raise UserError("give --config and --head together, or neither for the built-in model")
    config, overrides, head, selector = (
        (args.config, args.set, args.head, args.selector) if args.config else builtin_model()
    )
    grounder = Grounder.load(read_config(config, [*overrides, *args.set]), head, args.selector or selector)
    try:
        server = make_server(grounder, args.port)
    except OSError as error:
        raise UserError(f"--port {args.port}: {error.strerror}; choose another") from error
    print(f"open http://127.0.0.1:{server.server_port} (Ctrl-C ends it)")
    server.serve_forever()


if __name__ == "__main__":
    run(main, parse_args())
