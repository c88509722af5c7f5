ulimit -u 1; exec timeout -k1 4 /tmp/t21/client/s5 connect -m 1 127.0.0.1:7001
