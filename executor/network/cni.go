//go:build linux

package network

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/kilnbuild/kiln/internal/cleanup"
	"golang.org/x/sys/unix"
)

// cniTimeout bounds how long plugins may take to disconnect a namespace.
const cniTimeout = 30 * time.Second

// cniDir is where namespaces are mounted for plugins to find, each in a file of
// its container ID.
func cniDir(dir string) string { return filepath.Join(dir, "cni") }

// cniUsed is the config that namespaces in cniDir were made with whose IDs have
// its sum.
func cniUsed(dir, sum string) string { return filepath.Join(dir, "cni-"+sum+".conflist") }

// cniID names a namespace and the config that it was made with.
func cniID(sum string) string { return "kiln-" + sum + "-" + strings.ToLower(rand.Text()) }

// cniSum is the sum in an ID.
func cniSum(id string) string {
	sum, _, _ := strings.Cut(strings.TrimPrefix(id, "kiln-"), "-")
	return sum
}

// plugins connects namespaces by running CNI plugins. They make links, addresses
// and rules that only they can remove, and for that need the namespace, also
// after a crash: so it is mounted.
type plugins struct {
	*membership
	cni  *libcni.CNIConfig
	list *libcni.NetworkConfigList
	sum  string // of list
	pool *pool
}

func openCNI(dir string, cfg Config, log *slog.Logger) (_ *plugins, err error) {
	p := &plugins{cni: newCNI(dir, cfg.CNIBinaries)}
	if p.list, err = readCNIConfig(cfg.CNIConfig); err != nil {
		return nil, fmt.Errorf("read CNI config file (--oci-cni-config-path): %w", err)
	}
	if _, err := os.Stat(cfg.CNIBinaries); err != nil {
		return nil, fmt.Errorf("find the directory of CNI plugins (--oci-cni-binary-dir): %w", err)
	}
	sum := sha256.Sum256(p.list.Bytes)
	p.sum = hex.EncodeToString(sum[:4])
	var first *Namespace
	p.membership, err = join(dir, func(alone bool) error {
		if alone {
			if err := removeLeft(dir, cfg, log); err != nil {
				return err
			}
		}
		if first, err = p.setUp(dir); err != nil && alone {
			err = errors.Join(err, forgetCNI(dir))
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	p.pool = newPool(poolConfig{
		make:  func(ctx context.Context) (*Namespace, error) { return p.connect(ctx, dir, "") },
		first: first, ahead: cfg.ahead(), keep: remembered, makers: makers(), log: log,
	})
	return p, nil
}

// setUp makes a first namespace, which shows whether it works and sets up what
// all others share.
func (p *plugins) setUp(dir string) (*Namespace, error) {
	unlock, err := lockInit()
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := os.MkdirAll(cniDir(dir), 0o700); err != nil {
		return nil, fmt.Errorf("make directory for namespaces: %w", err)
	}
	if err := os.WriteFile(cniUsed(dir, p.sum), p.list.Bytes, 0o600); err != nil {
		return nil, fmt.Errorf("remember CNI config: %w", err)
	}
	ctx, cancel := context.WithTimeoutCause(context.Background(), makeTimeout, errTooLong)
	defer cancel()
	return p.connect(ctx, dir, "")
}

func newCNI(dir, binaries string) *libcni.CNIConfig {
	return libcni.NewCNIConfigWithCacheDir([]string{binaries}, filepath.Join(dir, "cni-cache"), nil)
}

// readCNIConfig reads a list of plugins or, under any other name, a single one.
func readCNIConfig(name string) (*libcni.NetworkConfigList, error) {
	if strings.HasSuffix(name, ".conflist") {
		return libcni.NetworkConfFromFile(name)
	}
	data, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	conf, err := libcni.NetworkPluginConfFromBytes(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w; if it is a list of plugins, its name must end in .conflist", name, err)
	}
	list, err := json.Marshal(map[string]any{
		"cniVersion": conf.Network.CNIVersion, "name": conf.Network.Name, "plugins": []json.RawMessage{conf.Bytes},
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return libcni.NetworkConfFromBytes(list)
}

func (p *plugins) Take(ctx context.Context, u User) (*Namespace, error) {
	if !servable(u.Hostname) {
		return p.pool.Take(ctx, u.Asks)
	}
	n, err := p.connect(ctx, p.dir, u.Hostname)
	if err != nil {
		return nil, err
	}
	p.pool.lend(n, u.Asks)
	return n, nil
}

// servable reports whether a name service could know a host by this name, which
// goes to plugins among other arguments.
func servable(hostname string) bool {
	return hostname != "" && !strings.ContainsFunc(hostname, func(c rune) bool {
		return (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '.'
	})
}

// connect makes a namespace and has the plugins connect it. One that has a name
// is not for others.
func (p *plugins) connect(ctx context.Context, dir, hostname string) (_ *Namespace, err error) {
	n, err := create(func(*Namespace) error { return nil })
	if err != nil {
		return nil, err
	}
	var undo cleanup.Stack
	defer func() { err = errors.Join(err, undo.Run()) }()
	undo.Add(n.close)
	id := cniID(p.sum)
	n.path = filepath.Join(cniDir(dir), id)
	if err := mountNamespace(n); err != nil {
		return nil, err
	}
	undo.Add(func() error { return unmountNamespace(n.path) })
	rt := runtimeConf(id, n.path)
	if hostname != "" {
		n.named = true
		rt.Args = [][2]string{{"K8S_POD_NAME", hostname}, {"IgnoreUnknown", "1"}}
	}
	if _, err := p.cni.AddNetworkList(ctx, p.list, rt); err != nil {
		// What the plugins have done until then is theirs to undo.
		return nil, errors.Join(fmt.Errorf("CNI plugins: connect a namespace: %w", err), disconnect(p.cni, p.list, rt))
	}
	n.disconnect = func() error { return errors.Join(disconnect(p.cni, p.list, rt), unmountNamespace(n.path)) }
	undo.Keep()
	return n, nil
}

func runtimeConf(id, path string) *libcni.RuntimeConf {
	return &libcni.RuntimeConf{ContainerID: id, NetNS: path, IfName: innerName}
}

func disconnect(cni *libcni.CNIConfig, list *libcni.NetworkConfigList, rt *libcni.RuntimeConf) error {
	ctx, cancel := context.WithTimeoutCause(context.Background(), cniTimeout, errTooLong)
	defer cancel()
	if err := cni.DelNetworkList(ctx, list, rt); err != nil {
		return fmt.Errorf("CNI plugins: disconnect a namespace: %w", err)
	}
	return nil
}

func (p *plugins) Close() error {
	err := p.pool.Close()
	return errors.Join(err, p.leave(func(alone bool) error {
		if alone {
			return forgetCNI(p.dir)
		}
		return nil
	}))
}

// forgetCNI removes files, unless a namespace is left for the next run.
func forgetCNI(dir string) error {
	switch err := os.Remove(cniDir(dir)); {
	case errors.Is(err, unix.ENOTEMPTY):
		return nil
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return err
	}
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "cni-") {
			err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	return err
}

// removeLeftCNI has plugins disconnect what a crashed daemon left. What can't be
// disconnected stays for the next start.
func removeLeftCNI(dir, binaries string, log *slog.Logger) {
	left, err := os.ReadDir(cniDir(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	cni := newCNI(dir, binaries)
	for _, e := range left {
		err = errors.Join(err, removeLeftNamespace(cni, dir, e.Name()))
	}
	if err == nil {
		err = forgetCNI(dir)
	}
	if err != nil {
		log.Warn("remove what CNI plugins made in an earlier run", "error", err)
	}
}

func removeLeftNamespace(cni *libcni.CNIConfig, dir, id string) error {
	list, err := libcni.NetworkConfFromFile(cniUsed(dir, cniSum(id)))
	if err != nil {
		return err
	}
	path := filepath.Join(cniDir(dir), id)
	rt := runtimeConf(id, path)
	switch is, err := isNamespace(path); {
	case err != nil:
		return err
	case !is: // the machine was started again: nothing but plugins' files is left
		rt.NetNS = ""
	}
	if err := disconnect(cni, list, rt); err != nil {
		return err
	}
	return unmountNamespace(path)
}

func mountNamespace(n *Namespace) error {
	if err := os.WriteFile(n.path, nil, 0o600); err != nil {
		return fmt.Errorf("make mount point for namespace: %w", err)
	}
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", n.FD()), n.path, "", unix.MS_BIND, ""); err != nil {
		return errors.Join(fmt.Errorf("mount namespace at %s: %w", n.path, err), os.Remove(n.path))
	}
	return nil
}

// unmountNamespace also removes the mount point, mounted on or not.
func unmountNamespace(path string) error {
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("unmount namespace %s: %w", path, err)
	}
	return os.Remove(path)
}

func isNamespace(path string) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return false, fmt.Errorf("look at namespace %s: %w", path, err)
	}
	return st.Type == unix.NSFS_MAGIC, nil
}
