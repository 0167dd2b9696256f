"""A fake of vLLM's weight-transfer interface: workers that receive a table over TCP, after faults that are queued."""

import json
import socket
from collections import defaultdict

import numpy as np
from engine_server import Handler, Server
from table_problem import REFERENCE, table

from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.samplers.channels import TCP


class Sends:
    """Gives a table policy what `Transfer` needs: a row of the table is a tensor."""

    sent = 0  # rows that were asked for

    def tensors(self):
        for number, row in enumerate(self.log_table()):
            self.sent += 1
            if self.rank == 0:
                yield f"rows.{number}", row

    def weight_channel(self, kind):
        assert kind == "tcp"
        return TCP(lambda row: memoryview(np.ascontiguousarray(row)).cast("B"))


class SendingTable(Sends, TablePolicy):
    pass


class TransferServer(Server):
    """Each path of `faults_at` has a queue: a status, "reset", "cut" (the workers' connections end), "deaf" (nothing is
    read, and the answer comes when the test lets go), or a function that is called first."""

    def __init__(self, workers=1):
        super().__init__()
        self.RequestHandlerClass = TransferHandler
        self.workers, self.faults_at, self.connections, self.parts = workers, defaultdict(list), [], []
        self.restart()
        self.commands.clear()

    def restart(self, workers=None):
        """As a server that was started again."""
        self.workers = workers or self.workers
        self.cut()
        self.version, self.active, self.asleep, self.rows = "default", False, False, {}
        self.policy = TablePolicy(table(REFERENCE))

    def cut(self):
        for connection in self.connections:
            connection.close()
        self.connections = []

    def __exit__(self, *error):
        super().__exit__(*error)
        self.cut()

    def take(self, path, body):
        """Raises: RuntimeError: what vLLM answers with 500."""
        if path == "/shutdown_weight_transfer_engine":
            self.cut()
        elif path == "/init_weight_transfer_engine":
            info = body["init_info"]
            for rank in range(self.workers):
                self.connections.append(socket.create_connection((info["address"], info["port"]), 10))
                self.connections[-1].sendall(info["token"].encode() + rank.to_bytes(4, "big"))
        elif path == "/start_weight_update":
            if self.active:
                raise RuntimeError("already active")
            self.active = True
        elif path == "/update_weights":
            if not self.active or not self.connections:
                raise RuntimeError("no connection to the trainer" if self.active else "start comes first")
            self.receive(**body["update_info"])
        elif path == "/finish_weight_update":
            if not self.active:
                raise RuntimeError("without a matching start")
            self.active, self.version = False, body.get("weight_version", self.version)
            if len(self.rows) == len(REFERENCE):
                self.load([row for _, row in sorted(self.rows.items())])
            self.rows = {}
        elif path == "/update_weight_version":
            self.version = body["new_version"]
        elif path in ("/sleep?level=1", "/wake_up"):
            self.asleep = path != "/wake_up"

    def receive(self, names, dtype_names, shapes):
        self.parts.append(names)
        try:
            for name, dtype, shape in zip(names, dtype_names, shapes, strict=True):
                copies = [self.array(connection, dtype, shape) for connection in self.connections]
                assert all(np.array_equal(copies[0], copy) for copy in copies)
                self.rows[name] = copies[0]
        except OSError as error:
            self.active = False
            raise RuntimeError(f"the connection ended: {error}") from error

    @staticmethod
    def array(connection, dtype, shape):
        array = np.empty(shape, dtype)
        view = memoryview(array).cast("B")
        while view:
            count = connection.recv_into(view)
            if not count:
                raise OSError("closed")
            view = view[count:]
        return array

    def load(self, rows):
        rows = np.exp(rows).tolist()
        self.policy = TablePolicy({str(x): {str(y): p for y, p in enumerate(row)} for x, row in enumerate(rows)})


class TransferHandler(Handler):
    def do_GET(self):
        known = {"/get_world_size": {"world_size": self.server.workers}, "/weight_info": {}}
        known["/weight_info"]["weight_version"] = self.server.version
        self.send(200 if self.path in known else 404, json.dumps(known.get(self.path)).encode())

    def do_POST(self):
        assert not (self.server.asleep and self.path == "/v1/completions"), "a server that sleeps was asked"
        super().do_POST()

    def take_weights(self, server, body):
        server.commands.append(self.path)
        queue = server.faults_at[self.path]
        fault = queue.pop(0) if queue else None
        if callable(fault):
            fault = fault()
        if fault == "deaf":
            server.held.set()
            server.let_go.wait(60)
        if fault == "cut":
            server.cut()
        if fault == "reset":
            self.close_connection = True
            return None
        if fault == "busy":
            return self.send(200, b'{"success": false}')
        if isinstance(fault, int):
            return self.send(fault, b"refused")
        try:
            server.take(self.path, body)
        except RuntimeError as error:
            return self.send(500, json.dumps({"error": str(error)}).encode())
        return self.send(200, b"{}")
