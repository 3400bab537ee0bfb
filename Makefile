# What developers and users run. Everything that has to be installed comes from
# Debian's packages and the Go module proxy.

GO      ?= go
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null)
LDFLAGS := -s -w -X github.com/kilnbuild/kiln/internal/version.Revision=$(VERSION)

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.PHONY: build
build: ## build kilnd, buildctl and kilnrun into bin/
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/kilnd ./cmd/buildctl ./cmd/kilnrun

.PHONY: peer
peer: ## build upstream's buildctl and buildkitd into bin/peer/
	cd hack/peer && CGO_ENABLED=0 $(GO) build -trimpath -o ../../bin/peer/ \
		github.com/moby/buildkit/cmd/buildctl github.com/moby/buildkit/cmd/buildkitd

.PHONY: buildx
buildx: ## build docker's buildx into bin/peer/
	cd hack/buildx && CGO_ENABLED=0 $(GO) build -trimpath -o ../../bin/peer/docker-buildx github.com/docker/buildx/cmd/buildx

.PHONY: deps
deps: ## install what the demo and the tests need, from Debian's packages
	hack/deps

.PHONY: demo
demo: deps build ## build the example, twice, and run what came out
	hack/demo

.PHONY: test
test: deps build peer buildx lint ## everything, end-to-end tests included; in CI also in a virtual machine, where there is KVM
	$(MAKE) -j2 -Oline unit e2e # end-to-end tests wait more than they work
	$(if $(CI),hack/vmtest ci)
	@echo
	@echo "all passed: lint, unit tests, end-to-end tests with the built-in runtime and with runc"

.PHONY: unit
unit: ## unit tests; -race in CI
	$(GO) test $(if $(CI),-race) -timeout 30m ./...

# In CI kiln doesn't build itself: that takes both processors for minutes, and as long
# as its modules and a Debian need to get there.
.PHONY: e2e
e2e: build peer buildx ## end-to-end tests through upstream's buildctl and buildx, with runc too, and rootless; kilnrun beside runc and crun
	$(GO) test -tags e2e -count=1 -timeout 30m $(if $(CI),-skip KilnBuildsKiln) ./hack/e2e
	KILN_E2E_RUNTIME=runc $(GO) test -tags e2e -count=1 -timeout 20m -run "$(RUNTIME_CASES)" ./hack/e2e
	KILN_E2E_ROOTLESS=1 $(GO) test -tags e2e -count=1 -timeout 10m -run "$(ROOTLESS_CASES)" ./hack/e2e
	$(GO) test -tags e2e -count=1 -timeout 10m ./hack/runtimes
	$(GO) test -tags e2e -count=1 -timeout 10m ./hack/oci

.PHONY: e2e-runtimes
e2e-runtimes: build peer ## all end-to-end tests with runc, kilnrun and crun as the daemon's runtime
	KILN_E2E_RUNTIME=runc $(GO) test -tags e2e -count=1 -timeout 30m -skip "$(BUILTIN_CASES)" ./hack/e2e
	KILN_E2E_RUNTIME=$(CURDIR)/bin/kilnrun $(GO) test -tags e2e -count=1 -timeout 30m -skip "$(BUILTIN_CASES)" ./hack/e2e
	KILN_E2E_RUNTIME=$(CURDIR)/hack/crun $(GO) test -tags e2e -count=1 -timeout 30m -skip "$(BUILTIN_CASES)" ./hack/e2e

# What the runtime of the steps makes a difference to, for a second runtime in `make e2e`.
RUNTIME_CASES := TestRun|CacheMounts|FailureCauses|Timeouts$$|Cancel|KillNine|Drain|StepOutlives|Unclaimed|Shell|DebugExec|BridgeNetwork|BadNetworks|Entitlements|Secrets|SSHAgent|AgentSocket|WholeLog|NestedBuild|Confinement|SixteenClients|ClientKilled|DiskFull

# What only the built-in runtime is tried with: rootless daemons have no other, what
# takes long shows nothing of the runtime, and attacks are on a sandbox that is ours.
BUILTIN_CASES := SameAsUpstream|SameCacheAsUpstream|RandomProjects|KilnBuildsKiln|TestRootless|TestDiskOfDaemon|TestAttacks

# What an ordinary user's daemon is tried with in `make e2e`, beside the tests of
# such a daemon alone. With KILN_E2E_ROOTLESS=1 all cases pass but those of bridges
# and memory limits (OutOfMemory), and those whose daemon reads files of the test's root.
ROOTLESS_CASES := TestRunWritesFile|TestRunEnvironment|TestRunMounts|TestCopyAndAdd|TestOCIArchive|TestPushAndUse|TestCancelLeavesNothing|TestShellIsAbandoned|TestTimeouts$$|TestSecretsLeaveNoTrace|TestFailureCauses/^[^O]|TestStepOutlivesDaemon/Killed

.PHONY: oci
oci: deps ## the OCI community's checks of kilnrun, and of runc and crun beside it
	KILN_OCI_PEERS=1 $(GO) test -tags e2e -count=1 -timeout 20m -v -run AsTheSpecificationSays ./hack/oci

.PHONY: containerd
containerd: deps ## containers of Debian's containerd with kilnrun as its runc
	hack/containerd/deps
	$(GO) test -tags e2e -count=1 -timeout 5m ./hack/containerd

.PHONY: engines
engines: deps ## containers of Debian's Podman and Docker with kilnrun as their runc
	hack/engines/deps
	hack/criu/deps
	$(GO) test -tags e2e -count=1 -timeout 10m ./hack/engines

.PHONY: criu
criu: deps ## containers written down by kilnrun and made again, with a criu that knows this kernel
	hack/criu/deps
	$(GO) test -tags e2e -count=1 -timeout 5m ./hack/criu

.PHONY: crash
crash: deps build ## kill the daemon 1,000 times and cut its power 100 times, under load
	$(GO) run ./hack/crash -n 1000 -damage
	$(GO) run ./hack/crash -n 100 -power

.PHONY: fault
fault: deps build ## let every request of the daemon's disk fail once, in each kind of work; takes an hour
	$(GO) run ./hack/fault -every

.PHONY: random
random: deps build peer ## build 200 random projects with kiln and with upstream
	KILN_RANDOM_PROJECTS=200 $(GO) test -tags e2e -count=1 -timeout 2h -run TestRandomProjects ./hack/e2e

.PHONY: vm
vm: ## tests of containers, mounts and limits in a virtual machine: Debian's kernel, systemd, cgroup v2
	hack/vmtest

.PHONY: lint
lint: ## gofmt, vet, staticcheck, import rows, forbidden imports
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { gofmt -l $$(git ls-files '*.go'); exit 1; }
	$(GO) vet -tags e2e,vm,selinux ./...
	$(GO) run honnef.co/go/tools/cmd/staticcheck@$(STATICCHECK) -tags e2e,vm,selinux ./...
	$(GO) run ./hack/lint

STATICCHECK := v0.7.0

.PHONY: compat
compat: ## which rows of the compatibility tables are proven by tests
	$(GO) run ./hack/compat

.PHONY: bench
bench: deps build peer ## compare with upstream, side by side
	$(GO) run ./hack/bench
