"""A local server of the chat-completions protocol."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """Answers each request with `answer(body)`: a text, or (status, headers, content)."""

    def __init__(self, answer):
        outer, self.seen, self.headers, lock = self, [], [], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.seen.append((self.path, body))
                    outer.headers.append(dict(self.headers))
                found = answer(body)
                usage = {"prompt_tokens": 100, "completion_tokens": 10}
                if isinstance(found, str):
                    found = 200, {}, {"choices": [{"message": {"content": found}}], "usage": usage}
                status, headers, content = found
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

            def log_message(self, format, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@contextlib.contextmanager
def serving(answer):
    """Runs the server in a thread; yields it."""
    server = Server(answer)
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()
