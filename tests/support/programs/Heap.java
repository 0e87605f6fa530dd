import java.net.StandardProtocolFamily;
import java.net.UnixDomainSocketAddress;
import java.nio.ByteBuffer;
import java.nio.channels.ServerSocketChannel;
import java.nio.channels.SocketChannel;
import java.util.Arrays;
import java.util.concurrent.ConcurrentHashMap;

/**
 * A service whose heap changes all the time: `java Heap.java SOCKET ENTRIES`.
 *
 * <p>Requests and answers are those of service.py. Each value of a table follows from its key and version. Two threads
 * replace values, one of the odd and one of the even keys, so that the collector moves the others.
 */
class Heap {
    static final int THREADS = 2;
    static final ConcurrentHashMap<Integer, long[]> table = new ConcurrentHashMap<>();
    static int[] versions;
    static final Object[] locks = {new Object(), new Object()};
    static final int[] next = {0, 1};
    static volatile boolean ended;

    static long[] content(int key) {
        long[] made = new long[512];
        Arrays.setAll(made, at -> key * 1_000_003L + versions[key] * 31L * at);
        return made;
    }

    static void change(int part, int count) {
        synchronized (locks[part]) {
            for (int done = 0; done < count; done++) {
                next[part] = (next[part] + THREADS * 3571) % versions.length;
                versions[next[part]]++;
                table.put(next[part], content(next[part]));
            }
        }
    }

    static boolean right() {
        synchronized (locks[0]) {
            synchronized (locks[1]) {
                for (int key = 0; key < versions.length; key++)
                    if (!Arrays.equals(table.get(key), content(key))) return false;
                return table.size() == versions.length;
            }
        }
    }

    static void work(int part) {
        try {
            while (!ended) {
                change(part, 100);
                Thread.sleep(10);
            }
        } catch (InterruptedException error) {
            throw new IllegalStateException(error);
        }
    }

    static String answer(String request) {
        switch (request) {
            case "check":
                return right() ? "right" : "wrong";
            case "write":
                for (int part = 0; part < THREADS; part++) change(part, versions.length / 8);
                return "done";
            default:
                ended = request.equals("quit");
                return "done";
        }
    }

    public static void main(String[] arguments) throws Exception {
        versions = new int[Integer.parseInt(arguments[1]) / 2 * 2];
        for (int key = 0; key < versions.length; key++) table.put(key, content(key));
        for (int part = 0; part < THREADS; part++) {
            int number = part;
            new Thread(() -> work(number)).start();
        }
        ServerSocketChannel server = ServerSocketChannel.open(StandardProtocolFamily.UNIX);
        server.bind(UnixDomainSocketAddress.of(arguments[0]));
        while (!ended) {
            try (SocketChannel client = server.accept()) {
                ByteBuffer buffer = ByteBuffer.allocate(100);
                client.read(buffer);
                String request = new String(buffer.array(), 0, buffer.position()).strip();
                client.write(ByteBuffer.wrap((answer(request) + "\n").getBytes()));
            }
        }
    }
}
