# Commands for building, testing and measuring. `make help` lists them.

PREFIX = /usr/local
ROOT = $(DESTDIR)$(PREFIX)
LISTEN = 1080
FUZZ_SECONDS = 30
FUZZ_TARGETS = proto reassembly rules session handshake protected datagrams proxy_header
CARGO = cargo
BINARY = $(or $(CARGO_TARGET_DIR),target)/release/s5

.PHONY: help build serve check test test-quick test-programs compare-clients bench bench-quick bench-programs soak fuzz torture test-system deb static install clean

help:              ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 16

build:             ## build the release binary
	$(CARGO) build --release --locked

serve: build       ## build s5 and run a server on LISTEN (1080, loopback)
	$(BINARY) serve --listen '$(LISTEN)'

check:             ## check format, lints and documentation; warnings are errors
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	cd tests/bench && $(CARGO) fmt --check && $(CARGO) clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --locked --no-deps --document-private-items

test: test-programs build ## install the programs that the tests need, and run all tests
	S5_TEST_STRICT=1 $(CARGO) test --locked

# tests/limits mostly waits for time limits, so it runs at the same time as the other tests. It measures times, so it
# has the higher priority.
QUICK_ENV = S5_TEST_PROGRAMS=none S5_TEST_RUN=quick RUST_TEST_THREADS=8
QUICK_TEST = $(CARGO) test --quiet --locked
QUICK = $(QUICK_ENV) $(QUICK_TEST)
OTHER_TESTS = --lib --test layering $(patsubst tests/%/main.rs,--test %,$(filter-out tests/limits/main.rs,$(wildcard tests/*/main.rs)))
test-quick:        ## build, and run the tests that need no other programs in less than a minute
	$(CARGO) test --locked --no-run
	rm -f '$(or $(CARGO_TARGET_DIR),target)/tmp/skipped-quick'
	$(QUICK) --test limits & env $(QUICK_ENV) nice -n 15 $(QUICK_TEST) $(OTHER_TESTS); status=$$?; wait $$! && $(QUICK) --test zz_skipped && exit $$status

# Programs that the tests run, each with its Debian package. Missing packages are listed, then installed.
PROGRAMS = curl:curl ncat:ncat nc.openbsd:netcat-openbsd ssh:openssh-client sshd:openssh-server git:git \
           python3:python3 danted:dante-server htpasswd:apache2-utils ip:iproute2 unshare:util-linux \
           strace:strace prlimit:util-linux script:bsdutils ss:iproute2 mount:mount fail2ban-regex:fail2ban \
           krb5kdc:krb5-kdc kadmin.local:krb5-admin-server kinit:krb5-user valgrind:valgrind \
           connect-proxy:connect-proxy dig:bind9-dnsutils unbound:unbound rsync:rsync man:man-db groff:groff-base mandoc:mandoc \
           bash:bash zsh:zsh fish:fish nft:nftables systemd-socket-activate:systemd systemd-analyze:systemd \
           haproxy:haproxy promtool:prometheus
test-programs:     ## install the programs that the tests need (Debian, as root or with sudo)
	@echo 'one test downloads the Python package pycurl into a temporary directory'
	@missing=; $(call FIND_MISSING,$(PROGRAMS)); \
	ls /usr/lib/*/libnss_myhostname.so.2 >/dev/null 2>&1 || missing="$$missing libnss-myhostname"; \
	/usr/bin/python3 -c 'import socks' 2>/dev/null || missing="$$missing python3-socks"; \
	/usr/bin/python3 -c 'import gssapi' 2>/dev/null || missing="$$missing python3-gssapi"; \
	/usr/bin/python3 -c 'import aiosmtpd' 2>/dev/null || missing="$$missing python3-aiosmtpd"; \
	$(INSTALL_MISSING)

FIND_MISSING = for pair in $(1); do \
	  PATH="$$PATH:/usr/sbin:/sbin" command -v "$${pair%%:*}" >/dev/null || missing="$$missing $${pair\#\#*:}"; \
	done
INSTALL_MISSING = [ -z "$$missing" ] || { echo "installing the Debian packages$$missing"; sudo=; [ "$$(id -u)" = 0 ] || sudo=sudo; \
	  $$sudo apt-get update && \
	  $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $$missing; }

BENCH = cd tests/bench && $(CARGO) run --release --locked --

bench: build bench-programs ## measure s5 and other SOCKS servers in 40 minutes; results in target/bench
	-$(BENCH) clients --out '$(CURDIR)/target/bench'
	$(BENCH) --out '$(CURDIR)/target/bench'

bench-quick: build bench-programs ## run a less exact bench in a minute
	-$(BENCH) clients --out '$(CURDIR)/target/bench'
	$(BENCH) --quick --out '$(CURDIR)/target/bench'

soak: build        ## run mixed load for 30 minutes; fail if memory grows or data is lost
	$(BENCH) soak --out '$(CURDIR)/target/bench'

BENCH_PROGRAMS = nc.openbsd:netcat-openbsd microsocks:microsocks danted:dante-server ssh:openssh-client sshd:openssh-server \
                 krb5kdc:krb5-kdc kadmin.local:krb5-admin-server kinit:krb5-user
bench-programs:    ## install the servers that s5 is compared with (Debian, as root or with sudo)
	@missing=; $(call FIND_MISSING,$(BENCH_PROGRAMS)); $(INSTALL_MISSING)

compare-clients: test-programs ## run s5 and other clients against the proxies of tests/client, and rewrite its table
	S5_TEST_STRICT=1 $(CARGO) test --locked --test client compare -- --ignored

fuzz:              ## fuzz each target for FUZZ_SECONDS (30)
	command -v cargo-fuzz >/dev/null || $(CARGO) install --locked cargo-fuzz
	RUSTC_BOOTSTRAP=1 $(CARGO) fuzz build --fuzz-dir tests/fuzz
	for target in $(FUZZ_TARGETS); do \
	  mkdir -p "tests/fuzz/corpus/$$target" "tests/fuzz/artifacts/$$target"; \
	  $(WITHOUT_NETWORK) tests/fuzz/target/*/release/"$$target" -artifact_prefix="tests/fuzz/artifacts/$$target/" \
	    -max_total_time=$(FUZZ_SECONDS) -timeout=5 -rss_limit_mb=1024 "tests/fuzz/corpus/$$target" || exit 1; \
	done

# Inputs of the fuzz targets name random hosts. SIGPIPE is ignored, as in every Rust program with a main function;
# cargo would undo that, so the targets run without it.
WITHOUT_NETWORK = unshare --user --map-root-user --net sh -c 'ip link set lo up; trap "" PIPE; exec "$$@"' sh

torture: test-programs ## fail each system call of a session once, with each error that it can have; 2 minutes
	S5_TEST_STRICT=1 RUST_TEST_THREADS=8 $(CARGO) test --locked --test torture -- --ignored

# Programs that only tests/system runs, each with its Debian package.
SYSTEM_PROGRAMS = socat:socat tc:iproute2 kvno:krb5-user debootstrap:debootstrap systemd-nspawn:systemd-container
test-system: test-programs ## run s5 behind HAProxy, in a booted systemd and so on, as root; less than 15 minutes
	@echo 'one test downloads the Python package kubernetes-validate into a temporary directory'
	@missing=; $(call FIND_MISSING,$(SYSTEM_PROGRAMS)); \
	/usr/bin/python3 -c 'import yaml' 2>/dev/null || missing="$$missing python3-yaml"; \
	$(INSTALL_MISSING)
	$(MAKE) --no-print-directory $(SYSTEM_ROOT) deb static
	S5_TEST_STRICT=1 RUST_TEST_THREADS=1 $(CARGO) test --locked --test system -- --ignored

# DEB_OPTIONS is for cargo-deb, such as --deb-version 0.1.1.
deb: build         ## build a Debian package, target/debian/s5_*.deb
	command -v cargo-deb >/dev/null || $(CARGO) install --locked cargo-deb
	$(MAKE) --no-print-directory install DESTDIR='$(CURDIR)/target/deb' PREFIX=/usr
	$(CARGO) deb --no-build --no-strip $(DEB_OPTIONS)

HOST = $(shell $(CARGO) -vV | sed -n 's/^host: //p')
static:            ## build a binary for any Linux of this architecture; s5 --version -v shows what it lacks
	RUSTFLAGS='-C target-feature=+crt-static' $(CARGO) build --release --locked --target $(HOST)
	@echo '$(or $(CARGO_TARGET_DIR),target)/$(HOST)/release/s5'

# Debian with systemd, for the container of tests/system: 300 MB, in 80 s.
SYSTEM_ROOT = target/system-root
$(SYSTEM_ROOT):
	rm -rf '$@.new'
	debootstrap --variant=minbase --include=systemd,systemd-sysv,dbus bookworm '$@.new'
	mv '$@.new' '$@'

# Builds only if there is no binary: with sudo, cargo is often not in PATH.
install: $(BINARY) ## install s5, its manual page and completions to PREFIX (/usr/local)
	install -D -m 755 $(BINARY) '$(ROOT)/bin/s5'
	mkdir -p '$(ROOT)/share/man/man1' '$(ROOT)/share/bash-completion/completions' \
	  '$(ROOT)/share/zsh/site-functions' '$(ROOT)/share/fish/vendor_completions.d'
	$(BINARY) --man > '$(ROOT)/share/man/man1/s5.1'
	$(BINARY) --completions bash > '$(ROOT)/share/bash-completion/completions/s5'
	$(BINARY) --completions zsh > '$(ROOT)/share/zsh/site-functions/_s5'
	$(BINARY) --completions fish > '$(ROOT)/share/fish/vendor_completions.d/s5.fish'

$(BINARY):
	$(CARGO) build --release --locked

clean:             ## remove build results
	$(CARGO) clean
