# Builds the networks of the lab in the current network namespace, which becomes their router. $1/etc has additional
# files for /etc. /run is for `ip netns` and HAProxy.
set -eu
cp /etc/hosts /etc/resolv.conf /etc/nsswitch.conf "$1/etc"
mount -t overlay -o "lowerdir=$1/etc:/etc" overlay /etc
mount -t tmpfs tmpfs /run
mkdir /run/haproxy
echo 1 > /proc/sys/net/ipv4/ip_forward
echo 1 > /proc/sys/net/ipv6/conf/all/forwarding

network() { # NAME NUMBER
    ip link add "$1" type bridge
    ip addr add "10.$2.0.1/24" dev "$1"
    ip addr add "fd00:$2::1/64" dev "$1" nodad
    ip link set "$1" up
}

host() { # NAME NETWORK NUMBER HOST
    ip netns add "$1"
    ip link add "$1" type veth peer name eth0 netns "$1"
    ip link set "$1" master "$2" up
    ip -n "$1" link set lo up
    ip -n "$1" addr add "10.$3.0.$4/24" dev eth0
    ip -n "$1" addr add "fd00:$3::$4/64" dev eth0 nodad
    ip -n "$1" link set eth0 up
    ip -n "$1" route add default via "10.$3.0.1"
    ip -n "$1" route add default via "fd00:$3::1"
    # Short sessions would use up the ports of a host.
    nsenter --net="/run/netns/$1" sh -c 'cd /proc/sys/net/ipv4; echo 1 > tcp_tw_reuse; echo 1024 65000 > ip_local_port_range'
}

dnat4= dnat6=
network clients 1
network servers 2
network targets 3
host client1 clients 1 11
host client2 clients 1 12
host client3 clients 1 13
host balancer servers 2 10
host node1 servers 2 21
host node2 servers 2 22
host node3 servers 2 23
host target targets 3 31

# Public addresses of the nodes, which only the router knows.
for node in 21 22 23; do
    dnat4="$dnat4 ip daddr 198.51.100.$node dnat to 10.2.0.$node;"
    dnat6="$dnat6 ip6 daddr 2001:db8::$node dnat to fd00:2::$node;"
done
nft "table ip nat { chain in { type nat hook prerouting priority dstnat; $dnat4 }; }
    table ip6 nat { chain in { type nat hook prerouting priority dstnat; $dnat6 }; }"

# A public address of the target.
ip addr add 203.0.113.1/24 dev targets
ip -n target addr add 203.0.113.31/24 dev eth0
