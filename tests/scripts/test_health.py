"""scripts/docker/health.sh, which decides whether a container is healthy, against servers of its own."""

import http.server
import os
import pathlib
import subprocess
import threading
import unittest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "scripts" / "docker" / "health.sh"


def answering(status):
    """A server that gives this status to /health, and 404 to anything else."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.send_response(status if self.path == "/health" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            """Nothing: the test says what went wrong."""

    return http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)


def check(port):
    return subprocess.run([SCRIPT], env={**os.environ, "KVERN_PORT": str(port)}, capture_output=True, text=True, check=False,
                          timeout=30)


class Health(unittest.TestCase):
    def answered(self, status):
        with answering(status) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            try:
                return check(server.server_address[1])
            finally:
                server.shutdown()
                thread.join()

    def test_a_server_that_is_ready_is_healthy(self):
        done = self.answered(200)
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_a_server_that_is_not_is_unhealthy_and_the_status_is_told(self):
        for status in (503, 404, 500):
            done = self.answered(status)
            self.assertEqual(done.returncode, 1)
            self.assertIn(f"expected status 200 of /health, found HTTP/1.1 {status}", done.stderr)

    def test_nobody_at_the_port_is_unhealthy(self):
        server = answering(200)
        port = server.server_address[1]
        server.server_close()
        self.assertNotEqual(check(port).returncode, 0)


if __name__ == "__main__":
    unittest.main()
