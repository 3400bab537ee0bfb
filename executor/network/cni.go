//go:build linux

package network

import (
	"context"
	"crypto/rand"
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

// cniUsed is the config that the namespaces in cniDir were made with.
func cniUsed(dir string) string { return filepath.Join(dir, "cni.conflist") }

// plugins connects namespaces by running CNI plugins. They make links, addresses
// and rules that only they can remove, and for that need the namespace, also
// after a crash: so it is mounted.
type plugins struct {
	cni  *libcni.CNIConfig
	list *libcni.NetworkConfigList
	dir  string
	pool *pool
}

func openCNI(dir string, cfg Config, log *slog.Logger) (_ *plugins, err error) {
	p := &plugins{cni: newCNI(dir, cfg.CNIBinaries), dir: dir}
	if p.list, err = readCNIConfig(cfg.CNIConfig); err != nil {
		return nil, fmt.Errorf("read CNI config file (--oci-cni-config-path): %w", err)
	}
	if _, err := os.Stat(cfg.CNIBinaries); err != nil {
		return nil, fmt.Errorf("find the directory of CNI plugins (--oci-cni-binary-dir): %w", err)
	}
	if err := os.MkdirAll(cniDir(dir), 0o700); err != nil {
		return nil, fmt.Errorf("make directory for namespaces: %w", err)
	}
	if err := os.WriteFile(cniUsed(dir), p.list.Bytes, 0o600); err != nil {
		return nil, fmt.Errorf("remember CNI config: %w", err)
	}
	unlock, err := lockInit()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	// The first one shows whether it works, and sets up what all others share.
	ctx, cancel := context.WithTimeoutCause(context.Background(), makeTimeout, errTooLong)
	defer cancel()
	first, err := p.connect(ctx, "")
	if err != nil {
		return nil, errors.Join(err, p.forget())
	}
	p.pool = newPool(cfg.ahead(), log, func(ctx context.Context) (*Namespace, error) { return p.connect(ctx, "") })
	first.pool = p.pool
	first.Release()
	return p, nil
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

func (p *plugins) Take(ctx context.Context, hostname string) (*Namespace, error) {
	if !servable(hostname) {
		return p.pool.Take(ctx)
	}
	n, err := p.connect(ctx, hostname)
	if err != nil {
		return nil, err
	}
	n.pool = p.pool
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
func (p *plugins) connect(ctx context.Context, hostname string) (_ *Namespace, err error) {
	n, err := create(func(*Namespace) error { return nil })
	if err != nil {
		return nil, err
	}
	var undo cleanup.Stack
	defer func() { err = errors.Join(err, undo.Run()) }()
	undo.Add(n.close)
	id := "kiln-" + strings.ToLower(rand.Text())
	n.path = filepath.Join(cniDir(p.dir), id)
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
		return nil, errors.Join(fmt.Errorf("CNI plugins: connect a namespace: %w", err), p.disconnect(rt))
	}
	n.disconnect = func() error { return errors.Join(p.disconnect(rt), unmountNamespace(n.path)) }
	undo.Keep()
	return n, nil
}

func runtimeConf(id, path string) *libcni.RuntimeConf {
	return &libcni.RuntimeConf{ContainerID: id, NetNS: path, IfName: innerName}
}

func (p *plugins) disconnect(rt *libcni.RuntimeConf) error {
	ctx, cancel := context.WithTimeoutCause(context.Background(), cniTimeout, errTooLong)
	defer cancel()
	if err := p.cni.DelNetworkList(ctx, p.list, rt); err != nil {
		return fmt.Errorf("CNI plugins: disconnect a namespace: %w", err)
	}
	return nil
}

func (p *plugins) Close() error { return errors.Join(p.pool.Close(), p.forget()) }

// forget removes the files of a run, unless a namespace is left for the next.
func (p *plugins) forget() error {
	err := os.Remove(cniDir(p.dir))
	if errors.Is(err, unix.ENOTEMPTY) {
		return nil
	}
	return errors.Join(err, os.Remove(cniUsed(p.dir)), os.RemoveAll(filepath.Join(p.dir, "cni-cache")))
}

// removeLeftCNI has plugins disconnect what a crashed daemon left. What can't be
// disconnected stays for the next start.
func removeLeftCNI(dir, binaries string, log *slog.Logger) {
	left, err := os.ReadDir(cniDir(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	p := &plugins{cni: newCNI(dir, binaries), dir: dir}
	if err == nil {
		p.list, err = libcni.NetworkConfFromFile(cniUsed(dir))
	}
	for _, e := range left {
		if err == nil {
			err = p.removeLeft(e.Name())
		}
	}
	if err == nil {
		err = p.forget()
	}
	if err != nil {
		log.Warn("remove what CNI plugins made in an earlier run", "error", err)
	}
}

func (p *plugins) removeLeft(id string) error {
	path := filepath.Join(cniDir(p.dir), id)
	rt := runtimeConf(id, path)
	switch is, err := isNamespace(path); {
	case err != nil:
		return err
	case !is: // the machine was started again: nothing but plugins' files is left
		rt.NetNS = ""
	}
	if err := p.disconnect(rt); err != nil {
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
