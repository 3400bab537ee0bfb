package main

import (
	"cmp"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/docker/cli/cli/config"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/auth/authprovider"
	"github.com/moby/buildkit/session/secrets/secretsprovider"
	"github.com/moby/buildkit/session/sshforward/sshprovider"
	"github.com/tonistiigi/go-csvvalue"
	"github.com/urfave/cli/v3"
)

// attachables are what the build may ask of this client besides files:
// registry credentials from Docker's config, secrets and SSH agents.
func attachables(c *cli.Command) ([]session.Attachable, error) {
	tlsConfigs, err := registryTLS(c.StringSlice("registry-auth-tlscontext"))
	if err != nil {
		return nil, err
	}
	out := []session.Attachable{authprovider.NewDockerAuthProvider(authprovider.DockerAuthProviderConfig{
		AuthConfigProvider: authprovider.LoadAuthConfig(config.LoadDefaultConfigFile(os.Stderr)),
		TLSConfigs:         tlsConfigs,
	})}
	if specs := c.StringSlice("secret"); len(specs) > 0 {
		a, err := secretProvider(specs)
		if err != nil {
			return nil, err
		}
		out = append(out, a)
	}
	if specs := c.StringSlice("ssh"); len(specs) > 0 {
		a, err := sshProvider(specs)
		if err != nil {
			return nil, err
		}
		out = append(out, a)
	}
	return out, nil
}

// csvMap reads k=v,k=v; known are the keys allowed.
func csvMap(flag, spec string, known ...string) (map[string]string, error) {
	fields, err := csvvalue.Fields(spec, nil)
	if err != nil {
		return nil, fmt.Errorf("--%s %q: %w", flag, spec, err)
	}
	out := map[string]string{}
	for _, f := range fields {
		k, v, ok := strings.Cut(f, "=")
		k = strings.ToLower(k)
		if !ok || !slices.Contains(known, k) {
			return nil, fmt.Errorf("--%s %q: %q is not key=value with a key of %s", flag, spec, f, strings.Join(known, ", "))
		}
		out[k] = v
	}
	return out, nil
}

// secretProvider reads id=ID[,src=FILE|,env=VAR][,type=file|env] (BCL-031).
func secretProvider(specs []string) (session.Attachable, error) {
	var sources []secretsprovider.Source
	for _, spec := range specs {
		m, err := csvMap("secret", spec, "id", "src", "source", "env", "type")
		if err != nil {
			return nil, err
		}
		src := secretsprovider.Source{ID: m["id"], FilePath: cmp.Or(m["src"], m["source"]), Env: m["env"]}
		switch m["type"] {
		case "", "file":
		case "env":
			if src.Env == "" {
				src.Env, src.FilePath = src.FilePath, ""
			}
		default:
			return nil, fmt.Errorf("--secret %q: type %q is neither file nor env", spec, m["type"])
		}
		sources = append(sources, src)
	}
	store, err := secretsprovider.NewStore(sources)
	if err != nil {
		return nil, fmt.Errorf("--secret: %w", err)
	}
	return secretsprovider.NewSecretProvider(store), nil
}

// sshProvider reads ID[=PATH[,PATH]][,raw=BOOL] (BCL-032).
func sshProvider(specs []string) (session.Attachable, error) {
	var configs []sshprovider.AgentConfig
	for _, spec := range specs {
		id, values, _ := strings.Cut(spec, "=")
		conf := sshprovider.AgentConfig{ID: id}
		for _, v := range strings.Split(values, ",") {
			switch raw, isRaw := strings.CutPrefix(v, "raw="); {
			case isRaw:
				b, err := strconv.ParseBool(raw)
				if err != nil {
					return nil, fmt.Errorf("--ssh %q: raw: %w", spec, err)
				}
				conf.Raw = b
			case v != "":
				conf.Paths = append(conf.Paths, v)
			}
		}
		if conf.Raw && len(conf.Paths) != 1 {
			return nil, fmt.Errorf("--ssh %q: raw=true needs exactly one socket", spec)
		}
		configs = append(configs, conf)
	}
	a, err := sshprovider.NewSSHAgentProvider(configs)
	if err != nil {
		return nil, fmt.Errorf("--ssh: %w", err)
	}
	return a, nil
}

func registryTLS(specs []string) (map[string]*authprovider.AuthTLSConfig, error) {
	out := map[string]*authprovider.AuthTLSConfig{}
	for _, spec := range specs {
		m, err := csvMap("registry-auth-tlscontext", spec, "host", "ca", "cert", "key", "insecure")
		if err != nil {
			return nil, err
		}
		if m["host"] == "" {
			return nil, fmt.Errorf("--registry-auth-tlscontext %q: host= is missing", spec)
		}
		conf := out[m["host"]]
		if conf == nil {
			conf = &authprovider.AuthTLSConfig{}
			out[m["host"]] = conf
		}
		if ca := m["ca"]; ca != "" {
			conf.RootCAs = append(conf.RootCAs, ca)
		}
		if m["cert"] != "" || m["key"] != "" {
			conf.KeyPairs = append(conf.KeyPairs, authprovider.TLSKeyPair{Key: m["key"], Certificate: m["cert"]})
		}
		if v := m["insecure"]; v != "" {
			if conf.Insecure, err = strconv.ParseBool(v); err != nil {
				return nil, fmt.Errorf("--registry-auth-tlscontext %q: insecure: %w", spec, err)
			}
		}
	}
	return out, nil
}
