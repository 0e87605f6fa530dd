// A service whose heap changes all the time: `node heap.js SOCKET ENTRIES`.
//
// Requests and answers are those of service.py. Each value of a table follows from its key and version, and may be a
// string, a list or a buffer outside of V8's heap. A timer replaces values, so that the garbage collector moves the
// others.
"use strict";
const crypto = require("crypto");
const net = require("net");

const [path, size] = [process.argv[2], Number(process.argv[3])];
const EACH = 200;
const versions = new Uint32Array(size);
const table = new Map();
let next = 0;

function content(key) {
  const text = `${key} ${versions[key]} `;
  switch (key % 3) {
    case 0:
      return text.repeat(100);
    case 1:
      return Array.from({ length: 200 }, (_, at) => key * 31 + versions[key] * at);
    default:
      return Buffer.alloc(12000, text);
  }
}

function same(one, other) {
  return Buffer.isBuffer(one) ? one.equals(other) : JSON.stringify(one) === JSON.stringify(other);
}

function change(count) {
  for (let done = 0; done < count; done++) {
    next = (next + 7919) % size;
    versions[next]++;
    table.set(next, content(next));
  }
}

function right() {
  for (let key = 0; key < size; key++) if (!same(table.get(key), content(key))) return false;
  return table.size === size;
}

function pooled() {
  return new Promise((done) => crypto.pbkdf2("a", "b", 1000, 16, "sha256", (error) => done(!error)));
}

for (let key = 0; key < size; key++) table.set(key, content(key));
const ticks = setInterval(() => change(EACH), 10);

const server = net.createServer((socket) => {
  socket.on("error", () => {});
  socket.on("data", async (request) => {
    let answer = "done";
    if (String(request) === "write\n") change(size >> 2);
    else if (String(request) === "check\n") answer = right() && (await pooled()) ? "right" : "wrong";
    else if (String(request) === "quit\n") {
      clearInterval(ticks);
      server.close();
    }
    socket.end(`${answer}\n`);
  });
});
server.listen(path);
