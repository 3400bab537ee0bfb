package dockerfile

import (
	"errors"
	"fmt"
	"os"
	"path"

	"github.com/kilnbuild/kiln/client/llb"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"
)

// mounts are the options that --mount says.
func (st *step) mounts(cmd *instructions.RunCommand) ([]llb.RunOption, error) {
	var opts []llb.RunOption
	for i, m := range instructions.GetMounts(cmd) {
		opt, err := st.mount(cmd, m, st.command.from[i])
		if err != nil {
			return nil, err
		}
		opts = append(opts, opt)
	}
	return opts, nil
}

func (st *step) mount(cmd *instructions.RunCommand, m *instructions.Mount, from *stage) (llb.RunOption, error) {
	if from != nil && !from.ready {
		return nil, fmt.Errorf("cannot mount from stage %q to %q, stage needs to be defined before current command", m.From, m.Target)
	}
	var opts []llb.MountOption
	var src llb.State
	switch m.Type {
	case instructions.MountTypeSecret:
		return st.secret(cmd, m)
	case instructions.MountTypeSSH:
		return st.ssh(cmd, m)
	case instructions.MountTypeTmpfs:
		src = llb.Scratch()
		opts = append(opts, llb.Tmpfs(m.SizeLimit))
	case instructions.MountTypeCache:
		src = llb.Scratch()
		if from != nil {
			src = from.state
		}
	default:
		src = st.sources
		if from != nil {
			src = from.state
		}
	}
	if m.ReadOnly {
		opts = append(opts, llb.Readonly)
	} else if m.Type == instructions.MountTypeBind {
		opts = append(opts, llb.ForceNoOutput)
	}
	if m.Type == instructions.MountTypeCache {
		opts = append(opts, st.cacheDir(m))
	}

	target := m.Target
	if !path.IsAbs(path.Clean(target)) {
		target = path.Join("/", st.stage.state.GetDir(), target)
	}
	if target == "/" {
		return nil, fmt.Errorf("invalid mount target %q", target)
	}
	if p := path.Join("/", m.Source); p != "/" {
		opts = append(opts, llb.SourcePath(p))
	} else if m.UID != nil || m.GID != nil || m.Mode != nil {
		src = ownedCache(m, src)
		opts = append(opts, llb.SourcePath("/cache"))
	}

	if from != nil {
		from.used.add(m.Source)
	} else if m.Type == instructions.MountTypeBind {
		st.used.add(m.Source)
	}
	return llb.AddMount(target, src, opts...), nil
}

func (st *step) cacheDir(m *instructions.Mount) llb.MountOption {
	sharing := llb.CacheMountShared
	switch m.CacheSharing {
	case instructions.MountSharingPrivate:
		sharing = llb.CacheMountPrivate
	case instructions.MountSharingLocked:
		sharing = llb.CacheMountLocked
	}
	id := m.CacheID
	if id == "" {
		id = path.Clean(m.Target)
	}
	return llb.AsPersistentCacheDir(st.cfg.cacheNamespace+"/"+id, sharing)
}

// ownedCache is what a cache with an owner or mode starts from.
func ownedCache(m *instructions.Mount, src llb.State) llb.State {
	f := fileOwner(m, 0o755)
	return src.File(llb.Mkdir("/cache", os.FileMode(f.mode), llb.WithUIDGID(f.uid, f.gid)),
		llb.WithCustomName("[internal] setting cache mount permissions"))
}

// ownership is who a mounted file belongs to.
type ownership struct{ uid, gid, mode int }

func fileOwner(m *instructions.Mount, mode int) ownership {
	o := ownership{mode: mode}
	if m.UID != nil {
		o.uid = int(*m.UID)
	}
	if m.GID != nil {
		o.gid = int(*m.GID)
	}
	if m.Mode != nil {
		o.mode = int(*m.Mode)
	}
	return o
}

// secret shows a secret as a file or a variable; as both if it has a target.
func (st *step) secret(cmd *instructions.RunCommand, m *instructions.Mount) (llb.RunOption, error) {
	windows := st.stage.platform.OS == "windows"
	target := toSlash(m.Target, st.stage.platform.OS)
	id := firstOf(m.Source, m.CacheID)
	if id == "" {
		if target == "" {
			return nil, errors.New("one of source, target required")
		}
		id = path.Base(target)
	}
	if windows && target != "" && !isAbs(target, "windows") {
		return nil, fmt.Errorf("secret target %q must be an absolute path, such as C:/path/to/secret", target)
	}
	if m.Env == nil && target == "" {
		if windows {
			return nil, fmt.Errorf("secret %s needs a target on Windows, such as target=C:/path/to/secret", id)
		}
		target = "/run/secrets/" + path.Base(id)
	}
	if m.Env != nil && *m.Env == "" {
		return nil, fmt.Errorf("secret %s: env needs the name of a variable", id)
	}
	st.stage.outline.needSecret(id, m.Required, cmd.Location())

	o := fileOwner(m, 0o400)
	opts := []llb.SecretOption{llb.SecretFileOpt(o.uid, o.gid, o.mode)}
	if !m.Required {
		opts = append(opts, llb.SecretOptional)
	}
	switch {
	case m.Env == nil:
		return llb.AddSecret(target, append(opts, llb.SecretID(id))...), nil
	case target == "":
		return llb.AddSecretEnv(id, *m.Env, opts...), nil
	}
	return llb.AddSecret(target, append(opts, llb.SecretID(id), llb.SecretAsEnvName(*m.Env))...), nil
}

func (st *step) ssh(cmd *instructions.RunCommand, m *instructions.Mount) (llb.RunOption, error) {
	if m.Source != "" {
		return nil, errors.New("ssh does not support source")
	}
	st.stage.outline.needSSH(firstOf(m.CacheID, "default"), m.Required, cmd.Location())
	o := fileOwner(m, 0o600)
	opts := []llb.SSHOption{llb.SSHID(m.CacheID), llb.SSHSocketOpt(m.Target, o.uid, o.gid, o.mode)}
	if !m.Required {
		opts = append(opts, llb.SSHOptional)
	}
	return llb.AddSSHSocket(opts...), nil
}
